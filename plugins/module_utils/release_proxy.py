# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The public port of one service: an HAProxy of its own, which is told at run time which release answers.

Who owns what:

* systemd holds the listening socket (``nemo-proxy-NAME.socket``) and hands it to HAProxy. While HAProxy is restarted,
  upgraded or killed, new connections wait in the socket's queue instead of being refused.
* The configuration has two servers, ``a`` and ``b``. A switch sets the address of the one that is free and makes it
  ready, then takes the other out, which finishes what it has begun: commands to the running process, no reload. They go to every worker, also to those that
  an earlier reload left behind for the requests that they still serve.
* Before the running process is told, the file is written, so that whatever starts HAProxy next starts it the same way.
* With rules it lets through only what one of them names. Paths are compared as they were written: what is written in any
  other way is refused, and nothing has to be decoded or normalised in the way that the application would.
"""

from __future__ import annotations

import csv
import hashlib
import io
import ipaddress
import json
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Callable, NamedTuple

from ansible_collections.nemo.platform.plugins.module_utils.container_release import (
    PROBE_AGENT,
    ReleaseError,
    listener,
    replace_file,
)

# command, descriptors that it inherits, environment -> status, output, errors
Executor = Callable[[Sequence[str], Sequence[int], Mapping[str, str]], tuple[int, str, str]]
Ports = dict[str, int]
ProxySettings = dict[str, Any]

SLOTS = ("a", "b")
WEIGHT = 256  # of the release that answers; the one that stands by while it is watched has 1
HEADER = "# Written by nemo.platform.container_release; the next run writes it again."

CONFIGURATION = """{header}
global
    description "{identity}"
    log stdout format raw daemon
    user {user}
    group {user}
    maxconn {max_connections}
    hard-stop-after {hard_stop}s
defaults
    mode http
    log global
    # what went well is in the application's log
    option httplog
    option dontlog-normal
    timeout connect 5s
    timeout http-request 30s
    timeout http-keep-alive {keep_alive}s
    timeout client {timeout}s
    timeout server {timeout}s
    timeout queue 30s
    timeout tunnel 1h
    # A container that starts again is waited for, a second for each attempt; then whichever release is ready answers.
    retries {retries}
    option redispatch 1
    retry-on conn-failure empty-response
    # A connection to the release for each request: an application that closes an idle one never races a request.
    option http-server-close
    # A reload never closes a connection on which a client may be sending its next request.
    option idle-close-on-response
    option forwardfor
frontend public
    bind {bind}
    # What may have been done already is not asked for twice.
    http-request disable-l7-retry unless {{ method GET HEAD OPTIONS }}
{errors}{rules}    default_backend release
backend release
{check}"""

ERRORS = """    # HAProxy's own words where a release is loaded, has broken off or takes too long; a release's own errors stay as they are.
{replies}
    http-after-response set-status 503 reason "Service Unavailable" if {{ status 502 504 }} {{ res.hdr(x-nemo-unavailable) -m found }}
    http-after-response del-header x-nemo-unavailable
"""

CHECK = """    option httpchk
    http-check send meth GET uri {path} ver HTTP/1.1 hdr Host localhost hdr User-Agent nemo-proxy-check
    http-check expect status 200-399
    # A busy release is not a dead one: only a connection that is refused counts at once.
    timeout check 5s
"""

# The most that a path below a prefix may be made of: no dot segments, no empty ones, nothing encoded.
ODD_PATH = r"//|/\.\.?(/|$)|[^A-Za-z0-9/._~:@!$&+,=-]"
PREFIX = "/*"
RULE_PATH = re.compile(r"^/(?:[A-Za-z0-9._~:@!$&+,=-]+(?:/[A-Za-z0-9._~:@!$&+,=-]+)*/?)?(?:(?<=/)\*)?$")
MINIMUM_KEY = 16

SOCKET = """{header}
[Unit]
Description=Public port of {name}

[Socket]
ListenStream={address}
Backlog=4096
FreeBind=true
TriggerLimitIntervalSec=0

[Install]
WantedBy=sockets.target
"""

SERVICE = """{header}
[Unit]
Description=HAProxy of {name}
Requires={unit}.socket
After={unit}.socket network.target
StartLimitIntervalSec=0

[Service]
Type=notify
Environment=NEMO_FD=3
RuntimeDirectory={unit}
ExecStart={binary} -Ws -f {configuration} -p /run/{unit}/pid -S {master},mode,600
ExecReload=/bin/kill -USR2 $MAINPID
KillMode=mixed
KillSignal=SIGUSR1
# A restart answers what was asked, and lets new connections wait, for so long at most.
TimeoutStopSec=20
SuccessExitStatus=143
Restart=always
RestartSec=100ms
LimitNOFILE=65536
NoNewPrivileges=true
OOMScoreAdjust=-500

[Install]
WantedBy=multi-user.target
"""


class Counters(NamedTuple):
    """What HAProxy has seen of one server."""

    current: int  # requests that it serves now
    total: int
    errors: int  # answers of 500 and above, connections that failed, answers that broke off


def check_proxy(params: Mapping[str, Any]) -> list[str]:
    """Everything wrong with the rules and keys, one line each, without a word of a key."""
    wrong: list[str] = []
    rules, keys = params["proxy_rules"] or [], params["proxy_keys"] or []
    for number, rule in enumerate(rules):

        def need(name: str, value: Any, good: bool, allowed: str, number: int = number) -> None:
            if not good:
                wrong.append("proxy_rules[%d].%s is %r; allowed: %s" % (number, name, value, allowed))

        path = rule["path"]
        good = bool(RULE_PATH.match(path)) and not {".", ".."} & set(path.split("/"))
        need("path", path, good, "a path such as /v1/models, or all below one: /v1/*; without anything encoded")
        for method in rule["methods"]:
            need("methods", method, bool(re.match(r"^[A-Z]{3,16}$", method)), "HTTP methods such as GET and POST")
        for source in rule["sources"]:
            try:
                ipaddress.ip_network(source)
            except ValueError as error:
                need("sources", source, False, "networks such as 10.0.0.0/16 (%s)" % error)
        need("key", rule["key"], bool(keys) or not rule["key"], "true only with proxy_keys")
    for number, key in enumerate(keys):
        # Visible ASCII: what a header can carry without a doubt about its encoding.
        if not re.match(r"^[!-~]{%d,}$" % MINIMUM_KEY, key):
            wrong.append("proxy_keys[%d] is not shown; allowed: %d or more visible characters" % (number, MINIMUM_KEY))
    if keys and not rules:
        wrong.append("proxy_keys has %d, proxy_rules none; allowed: with rules, such as {path: /*}" % len(keys))
    return wrong


def proxy_settings(params: Mapping[str, Any]) -> ProxySettings:
    """What the module's arguments say about the public port; it is kept with the state, for those who only roll back."""
    keys = params["proxy_keys"] or []
    settings = {
        "address": params["bind_address"],
        "port": params["port"],
        "timeout": params["proxy_timeout"],
        "keep_alive": params["proxy_keep_alive"],
        "max_connections": params["proxy_max_connections"],
        "retries": params["proxy_retries"],
        "drain": params["drain_timeout"],
    }
    later = {
        "rules": [
            dict(rule, key=bool(keys) if rule["key"] is None else rule["key"]) for rule in params["proxy_rules"] or []
        ],
        "keys": sorted(hashlib.sha256(key.encode()).hexdigest() for key in keys),
        "retry_after": params["proxy_retry_after"],
        "check": params["proxy_check_path"] if params["proxy_check"] else "",
    }
    settings.update({key: value for key, value in later.items() if value})
    return settings


def error_body(message: str, kind: str, code: int) -> str:
    """An error object of the OpenAI API, which its clients show as it is."""
    return json.dumps({"error": {"message": message, "type": kind, "code": code}})


def reply_lines(settings: ProxySettings) -> str:
    """What HAProxy answers itself while no release can."""
    seconds = settings.get("retry_after") or 0
    if not seconds:
        return ""
    body = error_body("No release can answer now. Try again in %d s." % seconds, "service_unavailable", 503)
    reply = (
        "    http-error status %d content-type application/json string '%s' hdr Retry-After %d hdr X-Nemo-Unavailable 1"
    )
    return ERRORS.format(replies="\n".join(reply % (status, body, seconds) for status in (502, 503, 504)))


def rule_lines(settings: ProxySettings) -> str:
    """The rules as conditions: named by one, in its sources, with its key; the host's own probe passes."""
    rules = settings.get("rules") or []
    if not rules:
        return ""
    lines = [
        # Who is on the host reaches the release's own port anyway.
        "acl own src 127.0.0.0/8 ::1" + ("" if settings["address"] in ("0.0.0.0", "::") else " " + settings["address"]),
        "acl probe req.hdr(user-agent) -m str %s" % PROBE_AGENT,
        "acl odd path -m reg '%s'" % ODD_PATH,
    ]
    if settings.get("keys"):
        lines += [
            # hex writes capitals
            "http-request set-var(txn.key) req.fhdr(authorization),bytes(7),sha2(256),hex"
            " if { req.fhdr(authorization) -m beg -i 'Bearer ' }",
            "acl key var(txn.key) -m str " + " ".join(key.upper() for key in settings["keys"]),
        ]
    for number, rule in enumerate(rules):
        path = rule["path"]
        if path.endswith(PREFIX):
            named = ["path%d" % number, "!odd"]
            lines.append("acl path%d path -m beg '%s'" % (number, path[:-1]))
        else:
            named = ["path%d" % number]
            lines.append("acl path%d path -m str '%s'" % (number, path))
        if rule["methods"]:
            named.append("method%d" % number)
            lines.append("acl method%d method %s" % (number, " ".join(rule["methods"])))
        inside = list(named)
        if rule["sources"]:
            inside.append("source%d" % number)
            lines.append("acl source%d src %s" % (number, " ".join(rule["sources"])))
        for what, conditions in (
            ("named", named),
            ("inside", inside),
            ("passes", inside + (["key"] if rule["key"] else [])),
        ):
            lines.append("http-request set-var(txn.%s) bool(true) if %s" % (what, " ".join(conditions)))
    lines += [
        # Neither an address of another host in the place of a path, nor a protocol that the rules would not see.
        "http-request set-var(txn.named) bool(false) unless { url -m beg / }",
        "http-request del-header Upgrade unless { req.hdr(upgrade) -m str -i websocket }",
    ]
    refusal = "http-request return status %d content-type application/json string '%s'%s if !{ var(txn.%s) -m bool } !own || !{ var(txn.%s) -m bool } !probe"
    for code, condition, text, kind, header in (
        (404, "named", "There is nothing here.", "not_found_error", ""),
        (403, "inside", "Not from this address.", "permission_error", ""),
        (
            401,
            "passes",
            "A valid key is needed: Authorization: Bearer.",
            "authentication_error",
            " hdr WWW-Authenticate Bearer",
        ),
    ):
        lines.append(refusal % (code, error_body(text, kind, code), header, condition, condition))
    return "".join("    %s\n" % line for line in lines)


def check_lines(settings: ProxySettings) -> str:
    return CHECK.format(path=settings["check"]) if settings.get("check") else ""


def short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class HAProxy:
    """HAProxy in front of one service."""

    def __init__(
        self,
        name: str,
        execute: Executor,
        binary: str | None,
        folder: str = "/etc/nemo/proxy",
        units: str = "/etc/systemd/system",
        runtime: str = "/run",
        after: Callable[[str], None] = lambda what: None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.execute = execute
        self.binary = binary
        self.folder = folder
        self.units = units
        self.unit = "nemo-proxy-%s" % name
        self.configuration = os.path.join(folder, "%s.cfg" % name)
        self.master = os.path.join(runtime, self.unit, "master.sock")
        self.after = after  # a test's place to kill the run
        self.sleep = sleep
        self.clock = clock

    # -- what is written

    def render(
        self,
        settings: ProxySettings,
        active: str,
        ports: Ports,
        standby: bool = False,
        bind: str = "fd@${NEMO_FD}",
    ) -> str:
        def text(identity: str) -> str:
            values = {key: settings[key] for key in ("timeout", "keep_alive", "max_connections", "retries")}
            return CONFIGURATION.format(
                header=HEADER,
                identity=identity,
                user="haproxy",
                bind='"%s"' % bind,
                hard_stop=self.hard_stop(settings),
                errors=reply_lines(settings),
                rules=rule_lines(settings),
                check=check_lines(settings),
                **values,
            )

        lines = text(short(text("")))
        check = " check inter 1s fall 2 rise 1" if settings.get("check") else ""
        for slot in SLOTS:
            state = "" if slot == active or standby else " disabled"
            weight = WEIGHT if slot == active or not standby else 1
            lines += "    server %s 127.0.0.1:%d weight %d%s%s\n" % (slot, ports.get(slot) or 1, weight, check, state)
        return lines

    @staticmethod
    def hard_stop(settings: ProxySettings) -> int:
        return int(settings["timeout"]) + int(settings["keep_alive"])

    def unit_files(self, settings: ProxySettings) -> dict[str, str]:
        service = SERVICE.format(
            header=HEADER,
            name=self.name,
            unit=self.unit,
            binary=self.binary,
            configuration=self.configuration,
            master=self.master,
        )
        socket_ = SOCKET.format(header=HEADER, name=self.name, address=self.address(settings))
        return {"%s.socket" % self.unit: socket_, "%s.service" % self.unit: service}

    @staticmethod
    def read(path: str) -> str | None:
        try:
            with open(path, encoding="utf-8") as stream:
                return stream.read()
        except OSError:
            return None

    def write(self, path: str, text: str) -> None:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        # HAProxy reads it as root, before it becomes a user of its own; nobody else has to see the digests of the keys.
        replace_file(path, text, 0o600 if path.startswith(self.folder) else 0o644)
        self.after("write %s" % os.path.basename(path))

    # -- what runs

    def call(self, doing: str, *command: str) -> str:
        rc, out, err = self.execute(command, (), {})
        if rc:
            lines = [line.strip() for line in (err or out).splitlines() if line.strip()]
            journal = self.journal() if command[0] == "systemctl" else []
            raise ReleaseError("proxy", "%s: %s" % (doing, lines[0] if lines else "status %d" % rc), journal)
        self.after(" ".join(command[:2]))
        return out

    def journal(self) -> list[str]:
        _rc, out, _err = self.execute(
            ("journalctl", "--no-pager", "--lines=10", "--output=cat", "--unit=%s.service" % self.unit), (), {}
        )
        return [line.strip() for line in out.splitlines() if line.strip()]

    def installed(self) -> bool:
        return bool(self.binary)

    def is_set_up(self) -> bool:
        return os.path.exists(self.configuration)

    def ask(self, command: str, master: str = "") -> str:
        """One command to the master's socket, which root alone can open."""
        answer = b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(5)
            connection.connect(master or self.master)
            connection.sendall(command.encode() + b"\n")
            connection.shutdown(socket.SHUT_WR)
            while True:
                part = connection.recv(65536)
                if not part:
                    return answer.decode("utf-8", "replace")
                answer += part

    def workers(self, master: str = "") -> list[str]:
        """Process ids, the newest worker first; those after it finish what they began before a reload."""
        found = []
        for line in self.ask("show proc", master).splitlines():
            fields = line.split()
            if len(fields) > 1 and fields[0].isdigit() and fields[1] == "worker":
                found.append(fields[0])
        return found

    def servers(self, worker: str) -> dict[str, dict[str, str]]:
        text = self.ask("@!%s show stat release 4 -1" % worker).lstrip()
        rows = csv.DictReader(io.StringIO(text.removeprefix("# ")))
        return {row["svname"]: row for row in rows if row.get("pxname") == "release"}

    def running(self) -> str | None:
        """What the newest worker was started with, None where none answers."""
        try:
            newest = self.workers()[:1]
            text = self.ask("@!%s show info" % newest[0]) if newest else ""
        except OSError:
            return None
        found = re.search(r"^description: (.*)$", text, re.MULTILINE)
        return found.group(1).strip() if found else None

    def identity(self, settings: ProxySettings) -> str:
        """What a process that has read the present configuration says of itself."""
        found = re.search(r'^    description "(\w+)"', self.render(settings, "a", {}), re.MULTILINE)
        assert found
        return found.group(1)

    def serves(self, active: str, port: int, standby: bool = False) -> bool:
        """Whether every worker sends what comes to this release; with a standby, nearly all of it."""
        try:
            workers = self.workers()
            return bool(workers) and all(self._leads(worker, active, port, standby) for worker in workers)
        except OSError:
            return False

    def _leads(self, worker: str, active: str, port: int, standby: bool) -> bool:
        for name, row in self.servers(worker).items():
            if name not in SLOTS:
                continue
            ready = not row["status"].startswith(("MAINT", "DRAIN"))
            if ready != (name == active or standby):
                return False
            if ready and row["weight"] != str(WEIGHT if name == active else 1):
                return False
            if name == active and row["addr"] != "127.0.0.1:%d" % port:
                return False
        return True

    def difference(self, settings: ProxySettings, active: str, ports: Ports) -> str:
        """What is not as it should be, in words; empty when all is."""
        for name, text in self.unit_files(settings).items():
            if self.read(os.path.join(self.units, name)) != text:
                return "%s differs" % name
        if self.read(self.configuration) != self.render(settings, active, ports):
            return "%s differs" % self.configuration
        running = self.running()
        if running is None:
            return "HAProxy does not run"
        if running != self.identity(settings):
            return "HAProxy runs with an older configuration"
        if not self.serves(active, ports[active]):
            return "HAProxy leads elsewhere"
        return ""

    # -- what is done

    def validate(self, text: str) -> None:
        """By HAProxy itself, with a socket in the place of the one that systemd holds."""
        draft = "%s.draft" % self.configuration
        self.write(draft, text)
        with socket.socket() as stand_in:
            stand_in.bind(("127.0.0.1", 0))
            stand_in.listen(1)
            rc, out, err = self.execute(
                (str(self.binary), "-Ws", "-c", "-q", "-f", draft),
                (stand_in.fileno(),),
                {"NEMO_FD": str(stand_in.fileno())},
            )
        os.unlink(draft)
        if rc:
            telling = [line for line in (err + out).splitlines() if "[ALERT]" in line] or [err or out]
            raise ReleaseError("proxy", "HAProxy refuses its configuration: %s" % telling[0])

    def ensure(self, settings: ProxySettings, active: str, ports: Ports) -> str:
        """HAProxy owns the public port and leads to this release. Says what had to be done for that, if anything."""
        if not self.installed():
            raise ReleaseError("proxy_missing", "there is no haproxy command on this host")
        difference = self.difference(settings, active, ports)
        if not difference:
            return ""
        bound = self.bound()
        elsewhere = bound != self.address(settings)
        if elsewhere and bound.rpartition(":")[2] != str(settings["port"]):
            self.need_port(settings)
        text = self.render(settings, active, ports)
        if self.read(self.configuration) != text:
            self.validate(text)
            self.write(self.configuration, text)
        files = self.unit_files(settings)
        before = {name: self.read(os.path.join(self.units, name)) for name in files}
        stale = [name for name in sorted(files) if self.read(os.path.join(self.units, name)) != files[name]]
        for name in stale:
            self.write(os.path.join(self.units, name), files[name])
        sockets, service = "%s.socket" % self.unit, "%s.service" % self.unit
        running = self.running()
        if stale or running is None or elsewhere:
            self.call("systemd cannot read the new units", "systemctl", "daemon-reload")
            if elsewhere and bound:
                # another public address: nobody who knows the old one can be kept
                self.call("%s cannot be stopped" % self.unit, "systemctl", "stop", service, sockets)
                running = None
            self.call("%s cannot be enabled" % self.unit, "systemctl", "--quiet", "enable", sockets, service)
            try:
                self.call("the public port cannot be opened", "systemctl", "start", sockets)
            except ReleaseError:
                if bound:
                    self.back_to(before)
                raise
            self.call("HAProxy cannot be started", "systemctl", "start", service)
        if running is not None and running != self.identity(settings):
            self.call("HAProxy cannot be reloaded", "systemctl", "reload", service)
        self.wait_for(settings)
        self.lead(active, ports)
        return difference

    def back_to(self, units: Mapping[str, str | None]) -> None:
        """The address that was open before is open again."""
        for name, text in units.items():
            self.write(os.path.join(self.units, name), text or "")
        self.execute(("systemctl", "daemon-reload"), (), {})
        self.execute(("systemctl", "start", *sorted(units)), (), {})

    @staticmethod
    def address(settings: ProxySettings) -> str:
        host = settings["address"]
        return "%s:%d" % ("[%s]" % host if ":" in host else host, settings["port"])

    def bound(self) -> str:
        """The address that systemd holds for the service now."""
        _rc, out, _err = self.execute(
            ("systemctl", "show", "--property=ActiveState,Listen", "%s.socket" % self.unit), (), {}
        )
        found = re.search(r"^Listen=(\S+) \(Stream\)", out, re.MULTILINE)
        return found.group(1) if found and "ActiveState=active" in out else ""

    def need_port(self, settings: ProxySettings) -> None:
        holder = listener(settings["address"], settings["port"])
        if holder:
            raise ReleaseError("port_taken", "port %d is taken by %s" % (settings["port"], holder))

    def wait_for(self, settings: ProxySettings, limit: float = 15) -> None:
        wanted = self.identity(settings)
        until = self.clock() + limit
        while self.running() != wanted:
            if self.clock() > until:
                raise ReleaseError(
                    "proxy", "HAProxy did not take its new configuration in %d s" % limit, self.journal()
                )
            self.sleep(0.1)

    def switch(self, settings: ProxySettings, active: str, ports: Ports, standby: bool = False) -> None:
        """From one release to the other, in the file first, then in the process that runs.

        With a standby, the other release gets what the new one does not accept, and one request in a few hundred.
        """
        text = self.render(settings, active, ports, standby)
        if self.read(self.configuration) != text:
            self.validate(text)
            self.write(self.configuration, text)
        self.lead(active, ports, standby)

    def hold(self, active: str) -> None:
        """No new request reaches the release that answers, because it is about to stop; what it has begun it finishes.

        Only the running process is told: one that is started anew meanwhile finds nobody at the release's port.
        """
        for worker in self.workers():
            self.tell(worker, "set server release/%s state maint" % active)
        self.after("proxy hold")

    def lead(self, active: str, ports: Ports, standby: bool = False, limit: float = 15) -> None:
        """Tell every worker; one that is just being started again has read the file."""
        other = SLOTS[1 - SLOTS.index(active)]
        until = self.clock() + limit
        while not self.serves(active, ports[active], standby):
            try:
                workers = self.workers()
                for worker in workers:
                    self.tell(worker, "set server release/%s addr 127.0.0.1 port %d" % (active, ports[active]))
                    self.tell(worker, "set server release/%s weight %d" % (active, WEIGHT))
                    self.tell(worker, "set server release/%s state ready" % active)
                self.after("proxy ready")
                for worker in workers:
                    if standby:
                        self.tell(worker, "set server release/%s weight 1" % other)
                    self.tell(worker, "set server release/%s state %s" % (other, "ready" if standby else "maint"))
                self.after("proxy maint")
                if self.serves(active, ports[active], standby):
                    return
            except OSError:
                pass
            if self.clock() > until:
                raise ReleaseError(
                    "proxy", "HAProxy could not be told to lead to port %d" % ports[active], self.journal()
                )
            self.sleep(0.1)

    def tell(self, worker: str, command: str) -> None:
        self.ask("@!%s %s" % (worker, command))

    def counters(self, slot: str) -> dict[str, Counters] | None:
        """Of each worker, by its process id; None where one does not answer, nothing where no HAProxy runs."""
        found: dict[str, Counters] = {}
        try:
            for worker in self.workers():
                row = self.servers(worker)[slot]
                errors = sum(int(row[name] or 0) for name in ("hrsp_5xx", "econ", "eresp"))
                found[worker] = Counters(int(row["scur"] or 0), int(row["stot"] or 0), errors)
        except (OSError, KeyError, ValueError):  # busy, or a worker that has just ended
            found = {}
        if found:
            return found
        _rc, state, _err = self.execute(("systemctl", "is-active", "%s.service" % self.unit), (), {})
        return {} if state.strip() in ("inactive", "failed") else None

    def cut(self, slot: str) -> None:
        """End what still runs on a server."""
        try:
            for worker in self.workers():
                self.tell(worker, "shutdown sessions server release/%s" % slot)
        except OSError:
            pass

    def remove(self, drain: bool = False) -> bool:
        """Nothing of it is left. Says whether there was anything. What it has begun it ends within its unit's limit, or not."""
        paths = [os.path.join(self.units, name) for name in ("%s.service" % self.unit, "%s.socket" % self.unit)]
        there = [path for path in paths + [self.configuration] if os.path.exists(path)]
        if not there:
            return False
        if any(path in there for path in paths):
            names = [os.path.basename(path) for path in paths if path in there]
            self.call("HAProxy cannot be stopped", "systemctl", "--quiet", "disable", *names)
            if not drain:
                self.execute(("systemctl", "kill", "--signal=TERM", "%s.service" % self.unit), (), {})
            self.call("HAProxy cannot be stopped", "systemctl", "stop", *names)
        for path in there:
            os.unlink(path)
            self.after("delete %s" % os.path.basename(path))
        self.call("systemd cannot forget the units", "systemctl", "daemon-reload")
        self.execute(("systemctl", "reset-failed", "%s.service" % self.unit), (), {})  # fails where nothing failed
        return True

    # -- the way from a container that holds the public port itself

    def _rules(self, settings: ProxySettings, port: int) -> list[list[str]]:
        match = ["-p", "tcp", "--dport", str(settings["port"]), "-m", "addrtype", "--dst-type", "LOCAL"]
        if settings["address"] not in ("0.0.0.0", "::"):
            match += ["-d", settings["address"]]
        match += ["-m", "comment", "--comment", self.unit, "-j", "REDIRECT", "--to-ports", str(port)]
        return [["PREROUTING"] + match, ["OUTPUT"] + match]

    def detour(self, settings: ProxySettings, port: int, release: int) -> bool:
        """Lead new connections past the container that holds the public port, by an HAProxy on another port.

        Connections that are there already stay with the container. Says whether this host can do that.
        """
        if self.execute(("iptables", "--version"), (), {})[0]:
            return False
        path = os.path.join(self.folder, "%s.detour.cfg" % self.name)
        text = self.render(settings, "a", {"a": release}, bind="0.0.0.0:%d" % port)
        self.write(path, text)
        unit = "%s-detour" % self.unit
        self.execute(("systemctl", "reset-failed", "%s.service" % unit), (), {})
        if self.execute(("systemctl", "--quiet", "is-active", "%s.service" % unit), (), {})[0]:
            self.call(
                "a second HAProxy cannot be started",
                "systemd-run",
                "--quiet",
                "--unit=%s" % unit,
                "--property=Type=notify",
                "--property=KillMode=mixed",
                "--property=KillSignal=SIGUSR1",
                "--property=TimeoutStopSec=%d" % self.hard_stop(settings),
                str(self.binary),
                "-Ws",
                "-f",
                path,
            )
        for rule in self._rules(settings, port):
            if self.execute(["iptables", "-w", "-t", "nat", "-C"] + rule, (), {})[0]:
                self.call("traffic cannot be led around", "iptables", "-w", "-t", "nat", "-I", *rule)
        return True

    def end_detour(self, settings: ProxySettings, port: int, drain: float) -> None:
        """The public port is HAProxy's own; what came by the detour is finished there."""
        for rule in self._rules(settings, port):
            for _attempt in range(5):
                if self.execute(["iptables", "-w", "-t", "nat", "-D"] + rule, (), {})[0]:
                    break
        unit = "%s-detour.service" % self.unit
        self.execute(("systemctl", "stop", "--no-block", unit), (), {})
        until = self.clock() + drain
        while (
            not self.execute(("systemctl", "--quiet", "is-active", unit), (), {})[0]
            or "deactivating" in (self.execute(("systemctl", "is-active", unit), (), {})[1])
        ):
            if self.clock() > until:
                self.execute(("systemctl", "kill", "--signal=KILL", unit), (), {})
                break
            self.sleep(0.2)
        path = os.path.join(self.folder, "%s.detour.cfg" % self.name)
        if os.path.exists(path):
            os.unlink(path)
        self.after("detour ended")
