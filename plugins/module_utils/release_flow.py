# Copyright: the nemo.platform authors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A release of one service on one host: begun, proven, led to, watched, kept or taken back.

Each release is a container of its own (``NAME.RELEASE``) on a loopback port, which HAProxy leads to. Two small files
carry the whole state, so that a run that was killed anywhere is finished or undone by the next one, whoever starts it:

``state.json``       which release answers, which are kept, what was released by whom, what failed; writing it with
                     another ``current`` is the moment of commitment
``transition.json``  there while a release is under way: ``start`` (nobody has been led to it; with stop-start the old
                     one may stand still), then ``switch`` (it is proven, and some or all requests go to it)

Nothing here may rely on a ``finally`` clause or an exception handler to leave the host in order: SIGKILL runs neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import re
import secrets as random_source
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, NoReturn, Protocol

from ansible_collections.nemo.platform.plugins.module_utils.container_release import (
    FORMAT,
    LOG_SEARCHED,
    OLD_FORMAT,
    RESTART,
    Container,
    Docker,
    Lock,
    Prober,
    Question,
    Record,
    ReleaseError,
    Settings,
    Store,
    architecture,
    connections,
    create_arguments,
    environment_text,
    health_of,
    image_folders,
    listener,
    memory_now,
    parse_size,
    port_range,
    probe_http,
    question_of,
    release_error,
    request_timeout,
    settings_of,
    spec_of,
    utc_now,
)
from ansible_collections.nemo.platform.plugins.module_utils.release_proxy import (
    SLOTS,
    Counters,
    Ports,
    ProxySettings,
    proxy_settings,
)

HEALTHY = "healthy"  # the whole way there, among the durations of its phases
SPEAK_EVERY = 10.0  # seconds between two words on a phase that lasts
READ_EVERY = 2.0  # seconds between two looks at the log of a release that is not healthy yet
HISTORY = 50  # releases that the state remembers
FAILURES = 20  # failed releases that it remembers
PROBES_LOST = 3  # health questions in a row without a good answer that end a release's watch
RULE = re.compile(r"^(.+)-(\d{8}-\d{4})$")  # tags of one service, in the order of their time
TO_REMEMBER = ("unhealthy", "start", "bake", "platform")  # what lies with the image and its settings
SAME = ("tag", "digest", "kind", "by", "result", "reason")  # of two tries that are one for the history


class Proxy(Protocol):
    """What leads traffic to a release; release_proxy.HAProxy, or a test's stand-in."""

    def is_set_up(self) -> bool: ...
    def installed(self) -> bool: ...
    def difference(self, settings: ProxySettings, active: str, ports: Ports) -> str: ...
    def ensure(self, settings: ProxySettings, active: str, ports: Ports) -> str: ...
    def switch(self, settings: ProxySettings, active: str, ports: Ports, standby: bool = False) -> None: ...
    def hold(self, active: str) -> None: ...
    def counters(self, slot: str) -> dict[str, Counters] | None: ...
    def cut(self, slot: str) -> None: ...
    def remove(self, drain: bool = False) -> bool: ...
    def detour(self, settings: ProxySettings, port: int, release: int) -> bool: ...
    def end_detour(self, settings: ProxySettings, port: int, drain: float) -> None: ...


class Guard(Protocol):
    """What starts the old release again when a run that has stopped it is killed; release_guard.Guard, or a stand-in."""

    def watch(self, old: str, new: str, seconds: int, port: int) -> None: ...


class Phases:
    """What a release that is not healthy yet says it does, how long it has done so, and how long that took last time."""

    def __init__(self, phases: Sequence[Mapping[str, str]], last: Mapping[str, float], began: float) -> None:
        self.phases = [(entry["name"], re.compile(entry["pattern"])) for entry in phases]
        self.last = last
        self.began = self.since = self.spoken = began
        self.read = began - READ_EVERY
        self.name = ""
        self.durations: dict[str, float] = {}

    def due(self, now: float) -> bool:
        return bool(self.phases) and now - self.read >= READ_EVERY

    def look(self, lines: Sequence[str], now: float) -> str:
        """What to say after a look at the log; empty when there is nothing new."""
        self.read = now
        found = [name for line in lines for name, pattern in self.phases if pattern.search(line)]
        name = found[-1] if found else self.name
        if name != self.name:
            self.end(now)
            self.name, self.since, self.spoken = name, now, now
            return self.text(now)
        if self.name and now - self.spoken >= SPEAK_EVERY:
            self.spoken = now
            return self.text(now)
        return ""

    def text(self, now: float) -> str:
        text = self.name + (" since %d s" % (now - self.since) if now - self.since >= 1 else "")
        return text + self.before(self.name)

    def before(self, name: str) -> str:
        return " (last time: %.1f s)" % self.last[name] if name in self.last else ""

    def end(self, now: float) -> None:
        if self.name:
            self.durations[self.name] = round(self.durations.get(self.name, 0.0) + now - self.since, 1)


def key_of(spec: str, health: Record) -> str:
    """A release and the way it is proven: what failed once fails again, until one of them changes."""
    return hashlib.sha256(json.dumps([spec, health], sort_keys=True).encode()).hexdigest()[:16]


def newer(tag: str, other: str) -> bool:
    """Whether a tag of the rule comes after another one of the same service."""
    one, two = RULE.match(tag), RULE.match(other)
    return bool(one and two and one.group(1) == two.group(1) and one.group(2) > two.group(2))


def outlasts(tag: str, wanted: str) -> bool:
    """Whether what was deployed stays where the rule has found another tag: it is newer, or a hotfix, which is not of that rule.

    A tag outside of the rule that is asked for was written by somebody who wants it.
    """
    one, two = RULE.match(tag), RULE.match(wanted)
    return newer(tag, wanted) or bool(two and (not one or one.group(1) != two.group(1)))


def label_of(record: Mapping[str, Any]) -> str:
    return "%s (%s)" % (record.get("tag", "?"), record.get("release", "?"))


class Releaser:
    """Brings one service to the wanted release, whatever an earlier run has left behind."""

    def __init__(
        self,
        params: Mapping[str, Any],
        docker: Docker,
        store: Store,
        proxy: Proxy,
        by: str,
        guard: Guard | None = None,
        check_mode: bool = False,
        probe: Prober = probe_http,
        find_listener: Callable[[str, int], str | None] = listener,
        memory: Callable[[], tuple[int, int]] = memory_now,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.params = dict(params)
        self.docker = docker
        self.store = store
        self.proxy = proxy
        self.by = by
        self.guard = guard
        self.check_mode = check_mode
        self.probe = probe
        self.find_listener = find_listener
        self.memory = memory
        self.sleep = sleep
        self.clock = clock
        self.tell = say
        self.name: str = params["name"]
        self.put_aside = "%s.before" % self.name  # the container of other origin that had the service's name
        self.began = clock()
        self.changed = False
        self.action = "none"
        self.kept = ""
        self.warnings: list[str] = []
        self.steps: list[str] = []
        self.before: Settings | None = None
        self.after: Settings | None = None
        self.images_lock = Lock(store.images_lock_path)
        self.server = ""
        self.image_folders: list[str] = []
        self.boxes: dict[str, Container] = {}
        self.legacy: Container | None = None
        self.undone: Record | None = None  # what a killed run began to release, taken back by this one
        try:
            self.load()
        except ReleaseError:  # who acts loads again, under the lock, and hears of it
            self.take({})

    def say(self, text: str) -> None:
        """Where the run is; shown with its result, and to those who look meanwhile."""
        self.steps.append("%.1f s: %s" % (self.clock() - self.began, text))
        self.tell(text)

    # -- the state

    def load(self) -> None:
        self.take(self.store.read("state.json") or {})

    def take(self, data: Record) -> None:
        self.current: str = data.get("current") or ""
        self.releases: list[Record] = list(data.get("releases") or [])
        self.pinned: Record | None = data.get("pinned") or None
        self.failed: list[Record] = list(data.get("failed") or [])
        self.history: list[Record] = list(data.get("history") or [])
        self.public: ProxySettings | None = data.get("proxy") or None
        self.ports: Ports = dict(data.get("ports") or {})
        # Its id, as an operator may give that name to a container of his own.
        self.aside: str = data.get("put_aside") or ""

    def save(self) -> None:
        self.store.write(
            "state.json",
            {
                "service": self.name,
                "current": self.current,
                "releases": self.releases,
                "pinned": self.pinned,
                "failed": self.failed[:FAILURES],
                "history": self.history[:HISTORY],
                "proxy": self.public,
                "ports": self.ports,
                "put_aside": self.aside,
            },
        )

    def journal(self, journal: Record, **values: Any) -> None:
        journal.update(values)
        self.store.write("transition.json", journal)

    def find(self, release: str) -> Record | None:
        return next((entry for entry in self.releases if release and entry["release"] == release), None)

    @property
    def record(self) -> Record | None:
        return self.find(self.current)

    @property
    def previous(self) -> Record | None:
        """The release that a rollback goes back to: the last one that served, and was not left because it was bad."""
        left = {entry.get("release") for entry in self.failed}
        return next((e for e in self.releases if e["release"] != self.current and e["release"] not in left), None)

    def remember(self, journal: Mapping[str, Any], result: str, reason: str = "", text: str = "") -> None:
        record = journal["record"]
        entry = {
            "release": record["release"],
            "tag": record["tag"],
            "digest": record["digest"],
            "kind": journal["kind"],
            "by": journal["by"],
            "at": journal["since"],
            "seconds": round(self.clock() - self.began, 1),
            "result": result,
            "reason": reason,
            "text": text[:300],
        }
        if reason and self.history and all(self.history[0].get(key) == entry[key] for key in SAME):
            self.history.pop(0)  # what is tried every few minutes would leave no room for who released what
        self.history.insert(0, entry)

    @contextlib.contextmanager
    def on_record(self) -> Iterator[None]:
        """A release that fails before it began is one of the past too: who then rolls back by reflex would leave what is good."""
        try:
            yield
        except Exception as error:
            self.record_failure(release_error(error))
            raise

    def record_failure(self, error: ReleaseError) -> None:
        if error.reason in ("lock", "state"):  # another run is at work, or nobody knows what there is
            return
        try:
            self.load()  # what the failed run has in mind was not written
            if self.record and self.record["spec"] == spec_of(self.foreseen()):
                return  # to ask for what is there is no release
            tag, last = self.params["tag"], self.history[0] if self.history else {}
            if error.reason == "failed_before" and (last.get("tag"), last.get("result")) == (tag, "failed"):
                return  # the failure itself says more
            wanted = {"release": "", "tag": tag, "digest": self.params["digest"] or ""}
            journal = {"record": wanted, "kind": "release", "by": self.by, "since": utc_now()}
            self.remember(journal, "failed", error.reason, error.text)
            self.save()
        except Exception as second:
            self.warnings.append("its failure is not recorded: %s" % release_error(second).text)

    # -- what stands on the host

    def look(self) -> None:
        names = [self.name, "%s.next" % self.name, "%s.previous" % self.name, self.put_aside]
        found = self.docker.containers(names + [n for n in self.docker.of_service(self.name) if n not in names])
        self.old_scheme = {name: entry for name, entry in found.items() if name in names}
        if self.put_aside in self.old_scheme and self.old_scheme[self.put_aside].id != self.aside:
            del self.old_scheme[self.put_aside]
        self.legacy = self.old_scheme.get(self.name)
        self.boxes = {entry.release: entry for name, entry in found.items() if name not in names and entry.release}

    def box_name(self, record: Mapping[str, Any]) -> str:
        return "%s.%s" % (self.name, record["release"])

    def inspect(self, record: Mapping[str, Any]) -> Container | None:
        return self.docker.containers([self.box_name(record)]).get(self.box_name(record))

    def lock_images(self) -> None:
        """Until it is released, no other run removes an image."""
        if not self.images_lock.acquire(self.params["lock_timeout"], shared=True):
            text = "another run is removing images, and did not end in %s s (it holds %s)"
            raise ReleaseError("lock", text % (self.params["lock_timeout"], self.images_lock.path))

    def wanted(self, digest: str | None) -> Settings:
        secrets = {key: environment_text(value) for key, value in (self.params["secrets"] or {}).items()}
        return settings_of(self.params, digest, self.store.revision(secrets, create=not self.check_mode))

    def foreseen(self) -> Settings:
        """What is wanted, as far as that is known without a pull."""
        digest, record = self.params["digest"] or None, self.record
        if not digest and record and record["tag"] == self.params["tag"]:
            digest = record["digest"]  # what the tag points at today is only known after a pull
        return self.wanted(digest)

    @property
    def wanted_public(self) -> ProxySettings:
        """The public port as it is asked for; who only rolls back leaves it as it is."""
        if self.params["state"] == "present" or not self.public:
            return proxy_settings(self.params)
        return self.public

    # -- what the module is asked for

    def present(self) -> None:
        self.hold()
        digest: str | None = self.params["digest"] or None
        if self.check_mode:
            self.predict()
            return
        with self.on_record():
            if not self.proxy.installed():
                raise ReleaseError("proxy_missing", "there is no haproxy command on this host")
            wanted = self.wanted(digest)
            self.before = (self.record or {}).get("settings")
            journal = self.recover(spec_of(wanted) if digest else None)
        if journal:
            self.after = wanted
            journal["kind"] = "release"  # whatever the killed run called it
            self.advance(journal)
            return
        with self.on_record():
            found = self.prepare(wanted, digest)
        if found:
            record, image = found
            self.after = record["settings"]
            self.begin(record, "release", image)

    def prepare(self, wanted: Settings, digest: str | None) -> tuple[Record, Record] | None:
        """The wanted release and its image, None where there is nothing to do."""
        if digest and (self.is_there(wanted) or self.failed_before(wanted)):
            return None
        self.need_on_host(wanted)
        self.lock_images()
        self.preflight()
        try:
            image = self.fetch(digest)
            if not digest:
                wanted = self.wanted(self.resolved(image))
                if self.is_there(wanted) or self.failed_before(wanted):
                    return None
            self.check_platform(image, wanted)
        except ReleaseError as error:
            if error.reason in TO_REMEMBER and wanted["digest"]:
                self.mark_failed(self.new_record(wanted, {"Id": ""}), error.reason, error.text)
                self.save()
            raise
        return self.new_record(wanted, image), image

    def is_there(self, wanted: Settings) -> bool:
        """The wanted release answers already; one that is only slow or still starting gets its time."""
        record = self.record
        if not record or record["spec"] != spec_of(wanted) or not self.is_serving(record):
            return False
        self.after = wanted
        self.learn_health(record)
        pinned = self.wanted_pin(record)
        if bool(pinned) != bool(self.pinned):
            self.pinned, self.changed, self.action = pinned, True, "pinned" if pinned else "unpinned"
            self.save()
        return True

    def learn_health(self, record: Record) -> None:
        """From now on the release is asked as the inputs say, where it answers that."""
        health = health_of(self.params)
        if health != record["health"] and self.problem(dict(record, health=health)) is None:
            record["health"] = health
            self.save()

    def rollback(self) -> None:
        """To the release before, or to one that is named by its id, tag or digest; nothing is pulled."""
        name = self.params["release"] or ""
        journal = None
        if not self.check_mode:
            journal = self.recover(None, name or None)
        current = self.record
        kept = [entry for entry in self.releases if entry["release"] != self.current]
        if name:
            named = [e for e in self.releases if name in (e["release"], e["tag"], e["digest"])]
            left = {entry.get("release") for entry in self.failed}
            # A tag or digest may be that of several: of the others first, as who asks wants to get away from the current one.
            order = (
                lambda e: e["release"] == name,
                lambda e: e["release"] != self.current and e["release"] not in left,
                lambda e: e["release"] == self.current,
                lambda e: True,
            )
            target = next((e for fits in order for e in named if fits(e)), None)
        else:
            target = journal["record"] if journal else self.previous
        if journal and target and journal["record"]["release"] == target["release"]:
            journal["kind"] = "rollback"
            self.advance(journal)
            return
        if not target:
            there = ", ".join(label_of(entry) for entry in kept) or "none"
            what = "release %s" % name if name else "release before the present one that was not left because it failed"
            raise ReleaseError("no_release", "there is no %s; kept are: %s" % (what, there))
        self.before, self.after = (current or {}).get("settings"), target["settings"]
        if target["release"] == self.current:
            self.say("%s is the release that answers already" % label_of(target))
            if self.undone:
                self.action = "rolled_back"
                self.leave(self.undone, target)
                self.save()
            return
        self.changed, self.action = True, "rolled_back"
        if self.check_mode:
            return
        self.need_on_host(target["settings"])
        self.lock_images()
        image = self.docker.image(target["image_id"]) or self.docker.image(
            "%s@%s" % (target["image"], target["digest"])
        )
        if not image:
            text = "the image of %s is no longer on this host; release its tag instead" % label_of(target)
            raise ReleaseError("no_release", text)
        self.begin(dict(target), "rollback", image)

    def absent(self) -> None:
        self.look()
        self.before = (self.record or (self.legacy and self.legacy.record) or {}).get("settings")
        found = list(self.boxes.values()) + list(self.old_scheme.values())
        if not found and not os.path.isdir(self.store.base) and not self.proxy.is_set_up():
            return
        self.changed, self.action = True, "removed"
        if self.check_mode:
            return
        journal = self.store.read("transition.json") or {}
        if journal.get("detour"):
            self.proxy.end_detour(journal["proxy"], journal["detour"], 0)
        self.proxy.remove()
        for entry in found:
            if entry.running:
                self.docker.stop(entry.name, self.params["stop_timeout"])
            self.docker.remove(entry.name, volumes=bool(entry.record))
        self.store.delete_all()
        if self.params["image"]:
            self.prune()

    def hold(self) -> None:
        """A run for the whole site takes nothing back that an operator released, rolled back or pinned here."""
        record = self.record
        if self.params["intent"] != "converge" or not record:
            return
        moved = record["image"] != self.params["image"]
        if record["tag"] == self.params["tag"] and not moved and self.params["digest"] in (None, "", record["digest"]):
            return
        if self.pinned:
            self.kept = "%s is pinned to %s (%s, by %s at %s)" % (
                self.name, record["tag"], self.pinned["why"], self.pinned["by"], self.pinned["since"],
            )  # fmt: skip
        elif record.get("intent") == "deploy" and not moved and outlasts(record["tag"], self.params["tag"]):
            text = "%s runs %s, which %s deployed and " + (
                "is newer than" if newer(record["tag"], self.params["tag"]) else "no rule compares with"
            )
            self.kept = (text + " %s") % (self.name, record["tag"], record["by"], self.params["tag"])
        else:
            return
        self.warnings.append(
            "%s; it stays. Release %s by playbooks/deploy.yml (the inference server: playbooks/vllm.yml -e vllm_intent=deploy) to"
            " change that" % (self.kept, self.params["tag"])
        )
        self.params.update(image=record["image"], tag=record["tag"], digest=record["digest"])

    def wanted_pin(self, record: Record) -> Record | None:
        if self.params["intent"] == "converge":
            return self.pinned
        if not self.params["pin"]:
            return None
        if self.pinned and self.current == record["release"]:
            return self.pinned
        return {"by": self.by, "since": utc_now(), "why": "pinned at its release"}

    def leave(self, left: Record | None, record: Record) -> None:
        """What was rolled back is not released again by runs that nobody asked for it."""
        why = "rolled back from %s" % (left or {}).get("tag", "nothing")
        self.pinned = {"by": self.by, "since": utc_now(), "why": why}
        if left:
            self.mark_failed(left, "rolled_back", "an operator rolled it back to %s" % record["tag"])
        self.forgive(record)

    def failed_before(self, wanted: Settings) -> bool:
        """Whether what runs stays, because a run for the whole site asks for what failed; to ask for just that is an error."""
        if self.params["force"]:
            return False
        key = key_of(spec_of(wanted), health_of(self.params))
        known = next((entry for entry in self.failed if entry["key"] == key), None)
        if not known:
            return False
        text = "this image with these settings failed before (%s, by %s): [%s] %s"
        text %= (known["at"], known["by"], known["reason"], known["text"])
        error, record = ReleaseError("failed_before", text), self.record
        if self.params["intent"] != "converge" or not record or self.problem(record):
            raise error
        self.kept = "%s runs %s, and %s is not tried again: %s" % (self.name, record["tag"], wanted["tag"], text)
        self.warnings.append("%s. %s" % (self.kept.rstrip("."), error.advice))
        self.after = self.before
        return True

    def predict(self) -> None:
        """Check mode: look, and touch nothing."""
        self.look()
        record = self.record
        self.before = (record or {}).get("settings")
        self.after = self.foreseen()
        box = self.boxes.get(self.current)
        if not record:
            self.changed, self.action = True, "replaced" if self.legacy else "released"
        elif record["spec"] != spec_of(self.after):
            if not self.failed_before(self.after):
                self.changed, self.action = True, "replaced"
        elif (
            self.store.read("transition.json")
            or not box
            or not box.running
            or box.paused
            or self.store.missing_secrets(record["release"], self.after["secrets"])
            or self.proxy.difference(self.wanted_public, record["slot"], self.ports)
            or self.problem(record)
        ):
            self.changed, self.action = True, "recovered"

    # -- what an interrupted run has left

    def recovered(self, text: str) -> None:
        self.changed = True
        self.action = "recovered"
        self.warnings.append(text)

    def recover(self, spec: str | None, release: str | None = None) -> Record | None:
        """Finish or undo what a killed run began; a transition that is the one that is asked for is returned instead."""
        self.look()
        self.recover_old_scheme()
        journal = self.store.read("transition.json")
        if not journal:
            self.reconcile()
            return None
        record = journal["record"]
        story = "begun by %s at %s: %s of %s" % (journal["by"], journal["since"], journal["kind"], label_of(record))
        self.recovered("an earlier run was interrupted (%s); this one has put that in order" % story)
        if self.current == record["release"]:
            self.finish(journal)
            self.reconcile()
            return None
        fit = False
        if journal["step"] == "switch":
            box = self.boxes.get(record["release"])
            fit = bool(box and box.running and not box.paused and self.problem(record) is None)
            if fit and (record["spec"] == spec or release in (record["release"], record["tag"], record["digest"])):
                return journal
        try:
            if fit and not journal["from"] and not journal["legacy"]:
                raise ReleaseError("unhealthy", "there is no release to go back to")
            self.undo(journal, strict=fit)
            self.remember(journal, "interrupted")
            self.save()
            self.store.delete("transition.json")
            self.undone = record if journal["kind"] == "release" else None
        except ReleaseError as error:
            origin = self.find(journal["from"])
            if not fit or (origin and self.problem(origin) is None):
                raise  # the engine's trouble, and no reason to lead anybody to what was not proven
            # What the killed run had proven is all that serves.
            self.warnings.append("%s; the interrupted release stays: %s" % (error.text, label_of(record)))
            self.alone(journal)
            self.take_over(journal)
            self.commit(journal)
            self.finish(journal)
        self.reconcile()
        return None

    def recover_old_scheme(self) -> None:
        """What a stop-start of before this scheme has left: it ends with one container of the service's own name."""
        upcoming, previous = (self.old_scheme.get("%s.%s" % (self.name, what)) for what in ("next", "previous"))
        if upcoming:
            self.docker.remove(upcoming.name)
        if previous:
            proven = self.store.read("release.json", OLD_FORMAT) or {}
            if self.legacy and self.legacy.release and self.legacy.release == proven.get("release"):
                self.docker.remove(previous.name, volumes=bool(previous.record))
            else:
                if self.legacy:
                    self.docker.remove(self.name)
                self.docker.rename(previous.name, self.name)
        if self.store.read("transition.json", OLD_FORMAT):
            self.store.delete("transition.json")
        if upcoming or previous:
            self.recovered("an earlier run was interrupted before HAProxy was in place")
            self.look()
        journal = self.store.read("transition.json")
        if self.legacy and not self.current and not journal and not self.legacy.running:
            self.recovered("%s was %s; it was started again" % (self.name, self.legacy.status))
            try:
                self.docker.unpause(self.name) if self.legacy.paused else self.docker.start(self.name)
            except ReleaseError as error:
                self.warnings.append(error.text)
            self.look()

    def reconcile(self) -> None:
        """The host is as the state says: the current release runs, HAProxy leads to it, and nothing else is there."""
        self.look()
        orphans = sorted(box.name for box in self.boxes.values() if box.running)
        if orphans and not self.releases:
            raise ReleaseError("state", "%s runs, and its record below %s is gone" % (orphans[0], self.store.base))
        record = self.record
        if record:
            box = self.boxes.get(self.current)
            if not box or box.paused or not box.running:
                state = box.status if box else "gone"
                self.recovered("the container of %s was %s; it was started again" % (label_of(record), state))
                try:
                    # Not waited for: it is proven where it is what is asked for, and left at once where it is not.
                    self.bring_up(record, wait=False)
                except ReleaseError as error:
                    self.warnings.append("the release that was there does not start: %s" % error.text)
                self.look()
            public = self.wanted_public
            done = self.proxy.ensure(public, record["slot"], self.ports)
            if done:
                self.say("public port %d: %s, put in order" % (public["port"], done))
                self.changed = True
                self.action = "recovered" if self.action == "none" else self.action
            if public != self.public:
                self.public = public
                self.save()
        self.sweep()

    def sweep(self) -> None:
        """Containers and secrets that no release of the state needs, and kept releases that run beside the current one."""
        known = {entry["release"] for entry in self.releases}
        for release, box in sorted(self.boxes.items()):
            if release not in known:
                self.docker.remove(box.name)
            elif release != self.current and (box.running or box.status == "restarting"):
                self.retire(self.find(release) or {})
        old = (self.legacy and self.legacy.release) or ""
        for release in sorted(self.store.release_ids() - known - {old}):
            self.store.delete_release(release)

    def bring_up(self, record: Record, wait: bool = True) -> None:
        """A release that was proven before runs again, and is healthy."""
        box = self.inspect(record)
        if box and box.paused:
            self.docker.unpause(box.name)
        elif not box or not box.running:
            image = self.docker.image(record["image_id"])
            if not box and not image:
                raise ReleaseError("no_release", "neither container nor image of %s is on this host" % label_of(record))
            before = record["host_port"]
            self.place(record, image or {}, new=False)
            if record["host_port"] != before:
                self.ports[record["slot"]] = record["host_port"]
                self.save()
        else:
            return
        if wait:
            self.prove(record, settle=0)

    # -- one release, step by step

    def begin(self, record: Record, kind: str, image: Record) -> None:
        journal = {
            "kind": kind,
            "strategy": self.params["strategy"],
            "step": "start",
            "record": record,
            "from": self.current,
            "legacy": bool(self.legacy and not self.current),
            "detour": 0,
            "held": False,
            "policy": self.legacy.policy if self.legacy else "",
            "ports": {},
            "proxy": self.wanted_public,
            "by": self.by,
            "since": utc_now(),
        }
        try:
            if self.params["strategy"] != "stop-start":
                self.need_memory(record)
            elif self.record or journal["legacy"]:
                self.stop_first(journal)
            self.journal(journal)
            self.say("starting %s" % label_of(record))
            self.place(record, image, new=kind == "release", journal=journal)
            self.images_lock.release()
            self.say("proving it on port %d" % record["host_port"])
            self.prove(record)
        except Exception as error:
            self.back_out(journal, release_error(error))
        self.advance(journal)

    def alone(self, journal: Record) -> None:
        """A proven release serves by itself; one that had to make room for the other is started again."""
        origin, record = self.find(journal["from"]), journal["record"]
        box = self.inspect(origin) if origin else None
        if origin and box and self.takes_turns(journal):
            self.docker.stop(box.name, int(origin["settings"]["stop_timeout"]))
        self.bring_up(record)

    @staticmethod
    def takes_turns(journal: Record) -> bool:
        return bool(journal.get("strategy") == "stop-start")

    def has_other(self, journal: Record) -> bool:
        """Whether another release comes back by itself, so that this one need not, as long as it is not committed.

        One that ends while it is watched is then refused by its port, and HAProxy asks the one that stands by, whatever the
        method; while the engine starts it again, its port would accept requests and lose them.
        """
        return bool(journal["from"] or (journal["legacy"] and self.takes_turns(journal)))

    def keep_up(self, journal: Record) -> None:
        """What is led to comes back by itself from now on, and what it replaces is as it was."""
        if not self.has_other(journal):
            return
        names = [self.box_name(journal["record"])]
        if self.takes_turns(journal):
            names += [box.name for release, box in self.boxes.items() if release == journal["from"]]
        self.docker.restart_policy(RESTART, *names)
        if journal["legacy"] and self.legacy:
            self.docker.restart_policy(journal.get("policy") or RESTART, self.name)

    def stop_first(self, journal: Record) -> None:
        """Where two do not fit: what serves stops, after it has answered what it was asked."""
        origin = self.record
        old = self.box_name(origin) if origin else self.name
        hold = bool(origin and journal["proxy"].get("retry_after") and self.proxy.is_set_up())
        self.journal(journal, held=hold)
        if self.guard:
            port = origin["host_port"] if origin else 0
            self.guard.watch(old, self.box_name(journal["record"]), self.params["stop_timeout"], port)
        if origin and hold:
            self.say("no new requests for %s" % label_of(origin))
            self.proxy.hold(origin["slot"])
            self.drain(origin["slot"])
        self.docker.restart_policy("always", old)  # so that it is back after a reboot, though it was stopped
        self.say("stopping the old release")
        self.docker.stop(old, int((origin["settings"] if origin else self.params)["stop_timeout"]))

    def advance(self, journal: Record) -> None:
        """From proven to committed; every step can be repeated."""
        try:
            self.take_over(journal)
            if journal["from"] or journal["legacy"]:  # else there is nothing to turn back to
                self.bake(journal["record"])
            self.commit(journal)
        except Exception as error:
            self.back_out(journal, release_error(error))
        try:
            self.finish(journal)
        except Exception as error:
            text = "the release serves, but tidying up failed and is left to the next run: %s"
            self.warnings.append(text % release_error(error).text)

    def place(self, record: Record, image: Record, new: bool, journal: Record | None = None) -> None:
        """The release's container runs, on a port that is free."""
        name = self.box_name(record)
        tried: set[int] = set()
        box = self.inspect(record)
        restart = "no" if journal and self.has_other(journal) else RESTART
        if box and restart != RESTART:
            self.docker.restart_policy(restart, name)
        while True:
            if box is None:
                record["host_port"] = self.free_port(tried)
                if journal:
                    self.journal(journal)
                self.create(record, image, new, restart)
            try:
                self.docker.start(name)
                return
            except ReleaseError as error:
                if error.reason != "port_taken" or len(tried) > 8:
                    raise
                tried.add(record["host_port"])
                self.docker.remove(name)
                box = None
                image = image or self.docker.image(record["image_id"]) or {}

    def free_port(self, tried: set[int]) -> int:
        taken = tried | self.store.used_ports()
        choice = [port for port in port_range(self.params["release_ports"]) if port not in taken]
        # at random: two services that begin at once hardly ever meet, and a meeting is seen and resolved
        random.SystemRandom().shuffle(choice)
        for port in choice:
            if not self.find_listener("127.0.0.1", port):
                return port
        raise ReleaseError("port_taken", "no port of release_ports %s is free" % self.params["release_ports"])

    def create(self, record: Record, image: Record, new: bool, restart: str) -> None:
        folder: str | None
        if new:
            secrets = {key: environment_text(value) for key, value in (self.params["secrets"] or {}).items()}
            folder = self.store.write_secrets(record["release"], secrets, self.params["user"])
        else:
            names = record["settings"]["secrets"]
            lost = self.store.missing_secrets(record["release"], names)
            if lost:
                text = "%s had lost the files of %s; release its tag instead" % (label_of(record), ", ".join(lost))
                raise ReleaseError("no_release", text)
            folder = os.path.join(self.store.releases, record["release"], "secrets") if names else None
        reference = "%s@%s" % (record["image"], record["digest"])
        if reference not in (image.get("RepoDigests") or []):
            reference = image["Id"]
        arguments = create_arguments(self.box_name(record), reference, record, folder, restart)
        try:
            self.docker.create(arguments)
        except ReleaseError as error:
            if "already in use" not in error.text:
                raise
            self.docker.remove(self.box_name(record))  # the late work of a run that was killed while it created
            self.docker.create(arguments)

    def take_over(self, journal: Record) -> None:
        """All traffic goes to the new release, none is dropped."""
        record = journal["record"]
        origin = self.find(journal["from"])
        slot = SLOTS[1 - SLOTS.index(origin["slot"])] if origin else SLOTS[0]
        ports = dict(self.ports if origin else {})
        ports[slot] = record["host_port"]
        record["slot"] = slot
        beside = self.boxes.get(origin["release"]) if origin else None
        standby = bool(self.params["bake_time"] and beside and beside.running and not self.takes_turns(journal))
        standby = standby and self.proxy.is_set_up()
        self.journal(journal, step="switch", ports=ports, standby=standby)
        public = journal["proxy"]
        self.say("leading traffic to it")
        if journal["legacy"]:
            self.move(journal, public, slot, ports)
        elif origin and self.proxy.is_set_up():
            self.proxy.switch(public, slot, ports, standby)
        else:
            self.proxy.ensure(public, slot, ports)
        if not standby:
            self.keep_up(journal)
        problem = self.problem_of(self.local(public["address"]), public["port"], record)
        if problem:
            raise ReleaseError("proxy", "it does not answer through port %d: %s" % (public["port"], problem))

    def move(self, journal: Record, public: ProxySettings, slot: str, ports: Ports) -> None:
        """From a container that holds the public port itself. New connections take a detour while it lets go of it."""
        port = journal["detour"] or self.free_port({ports[slot]})
        self.journal(journal, detour=port)
        legacy = self.docker.containers([self.name]).get(self.name)
        if legacy and legacy.running:
            if self.proxy.detour(public, port, ports[slot]):
                self.drain_legacy(legacy, public["port"])
            else:
                text = "this host has no iptables: requests were refused from the stop of the old container until HAProxy had its port"
                self.warnings.append(text)
            self.docker.stop(self.name, self.params["stop_timeout"])
        self.proxy.ensure(public, slot, ports)
        self.proxy.end_detour(public, port, self.params["drain_timeout"])
        self.journal(journal, detour=0)

    def drain_legacy(self, legacy: Container, port: int) -> None:
        """New connections are led around it: those that it has are waited for, as far as they end."""
        until = self.clock() + self.params["drain_timeout"]
        while True:
            left = len(connections("/proc/%d" % legacy.pid, legacy.inside.get(port, port)))
            if not left:
                return
            if self.clock() >= until:
                text = "%d connections to the old container were still open after %s s, and ended with it"
                self.warnings.append(text % (left, self.params["drain_timeout"]))
                return
            self.sleep(0.2)

    def move_back(self, journal: Record, strict: bool) -> None:
        """The container that held the public port has it again. New connections go to the new release meanwhile, if it runs."""
        record, public = journal["record"], journal["proxy"]
        if self.takes_turns(journal):
            self.stop_failed(journal)
        box = self.inspect(record)
        around = False
        if box and box.running and self.proxy.is_set_up():
            self.journal(journal, detour=journal["detour"] or self.free_port({record["host_port"]}))
            around = self.proxy.detour(public, journal["detour"], record["host_port"])
        self.proxy.remove(drain=around)
        self.docker.start(self.name)  # of a container that runs already this is no change
        if self.takes_turns(journal):
            self.docker.restart_policy(journal.get("policy") or RESTART, self.name)
        if self.legacy and (self.legacy.record or journal["detour"]):
            self.attempt(strict, self.wait_legacy, self.legacy.record or {})
        if journal["detour"]:
            self.proxy.end_detour(public, journal["detour"], self.params["drain_timeout"])

    def commit(self, journal: Record) -> None:
        if journal["standby"]:  # else it is so since it was led to
            self.keep_up(journal)
        record = dict(journal["record"], since=utc_now(), by=journal["by"], kind=journal["kind"])
        if journal["kind"] == "release":
            record["intent"] = "deploy" if self.kept else self.params["intent"]
        before = self.record
        if journal["kind"] == "rollback":
            self.leave(before, record)
        else:
            self.pinned = self.wanted_pin(record)
            self.forgive(record)
        rest = [entry for entry in self.releases if entry["release"] != record["release"]]
        if journal["legacy"]:
            rest = self.adopted() + rest
        had = bool(before or journal["legacy"])
        self.releases, self.current = [record] + rest, record["release"]
        self.ports, self.public = journal["ports"], journal["proxy"]
        self.remember(journal, "ok")
        self.save()
        self.changed = True
        self.action = "rolled_back" if journal["kind"] == "rollback" else "replaced" if had else "released"

    def adopted(self) -> list[Record]:
        """The release of before HAProxy, to roll back to: its image and secrets are here, its container will be made anew."""
        old = self.legacy.record if self.legacy else None
        if not old or old.get("format") != OLD_FORMAT:
            return []
        settings = {key: value for key, value in old["settings"].items() if key not in ("bind_address", "port")}
        proven = self.store.read("release.json", OLD_FORMAT) or {}
        adopted = dict(
            old,
            format=FORMAT,
            settings=settings,
            spec=spec_of(settings),
            health=dict(health_of(self.params), **old["health"]),
            host_port=0,
            slot=SLOTS[1],
        )
        if proven.get("release") == old["release"]:
            adopted["since"] = proven.get("since", "")
        return [adopted]

    def finish(self, journal: Record) -> None:
        """After the commitment: the old release ends in peace, and nothing is left that no kept release needs."""
        self.look()
        current = self.record
        if current and self.public:
            self.proxy.switch(self.public, current["slot"], self.ports)  # the old one no longer stands by
        for release, box in sorted(self.boxes.items()):
            entry = self.find(release)
            if entry and release != self.current and (box.running or box.status == "restarting"):
                self.say("draining %s" % label_of(entry))
                self.retire(entry)
        if journal.get("detour"):
            self.proxy.end_detour(journal["proxy"], journal["detour"], self.params["drain_timeout"])
        if journal["legacy"] and self.legacy:
            self.leave_legacy()
        elif not journal["legacy"] and self.put_aside in self.old_scheme:
            self.docker.remove(self.put_aside, volumes=False)
        # the same image with the same settings is nothing to roll back to
        others = [entry for entry in self.releases if entry["release"] != self.current]
        others = [entry for entry in others if not current or entry["spec"] != current["spec"]]
        kept = [entry for entry in self.releases if entry["release"] == self.current] + others[: self.params["keep"]]
        if len(kept) < len(self.releases):
            self.releases = kept
            self.save()
        self.store.delete("release.json")
        self.store.delete("transition.json")
        self.look()
        self.sweep()
        self.prune()

    def leave_legacy(self) -> None:
        """A release of before HAProxy can be made anew from its image; of a container of other origin nobody knows how."""
        if self.adopted():
            self.docker.remove(self.name)
        else:
            if self.put_aside in self.old_scheme:
                self.docker.remove(self.put_aside, volumes=False)
            self.docker.restart_policy("no", self.name)
            if self.docker.containers([self.put_aside]):
                text = "the container %s that served before is kept, stopped: another has the name %s"
            else:
                self.aside = self.legacy.id if self.legacy else ""
                self.save()
                self.docker.rename(self.name, self.put_aside)
                text = "the container %s that served before is kept, stopped, as %s, until the next release"
            self.warnings.append(text % (self.name, self.put_aside))
        self.legacy = None

    def drain(self, slot: str) -> None:
        until = self.clock() + self.params["drain_timeout"]
        while True:
            seen = self.proxy.counters(slot)
            left = None if seen is None else sum(worker.current for worker in seen.values())
            if left == 0:
                return
            if self.clock() >= until:
                what = "HAProxy did not say how many" if left is None else "%d" % left
                text = "%s requests were still being answered %s s after the switch, and were ended"
                self.warnings.append(text % (what, self.params["drain_timeout"]))
                self.proxy.cut(slot)
                return
            self.sleep(0.2)

    def retire(self, record: Record) -> None:
        """A kept release stands still, after it has answered what it was asked."""
        current = self.record
        if current and record["slot"] != current["slot"] and self.ports.get(record["slot"]) == record["host_port"]:
            self.drain(record["slot"])
        self.docker.stop(self.box_name(record), int(record["settings"]["stop_timeout"]))

    # -- when it goes wrong

    def back_out(self, journal: Record, error: ReleaseError) -> NoReturn:
        """What served before serves; then the run fails with what the new release said."""
        record = journal["record"]
        reason, text, log, cause = error.reason, error.text, list(error.log_tail), ""
        seconds = self.clock() - self.began
        safe = False
        try:
            self.load()
            origin = self.find(journal["from"])
            if origin and journal.get("standby"):  # it runs, and has the traffic again whatever the engine does
                self.proxy.switch(journal["proxy"], origin["slot"], self.ports)
                safe = True
            self.changed = bool(self.store.read("transition.json"))
            box = self.inspect(record)
            if box:
                cause = self.cause(box)
                log = log or self.docker.logs(self.box_name(record), record["health"])
            led = journal["step"] == "switch"
            text += (": found in its log: %s" % cause if cause else "") + ". " + self.undo(journal)
            self.action = "restored" if led or self.params["strategy"] == "stop-start" else "removed"
            if reason in TO_REMEMBER:
                self.mark_failed(record, reason, text)
            self.remember(journal, "failed", reason, text)
            self.save()
            self.store.delete("transition.json")
            self.say("taken back %.1f s after the decision" % (self.clock() - self.began - seconds))
        except Exception as second:
            what = release_error(second).text
            if safe or self.untouched(journal):
                text += ". The release before it has the traffic again; the rest is left to the next run: %s" % what
            else:
                text += ". WHAT SERVED BEFORE DOES NOT SERVE EITHER: %s. The next run tries again" % what
        raise ReleaseError(reason, text, log, cause)

    def untouched(self, journal: Record) -> bool:
        """Whether the release before still has its traffic, because nobody was led to the failed one, and answers."""
        origin = self.find(journal["from"])
        try:
            return bool(origin and journal["step"] == "start" and self.problem(origin) is None)
        except Exception:
            return False

    def cause(self, box: Container) -> str:
        """What the log of a failed release says of the reason, by the patterns that are asked for; empty without any."""
        patterns = self.params["failure_patterns"] or []
        since = "" if box.restarts else box.started
        lines = self.docker.log(box.name, LOG_SEARCHED, since) if patterns else []
        for entry in patterns:
            for line in lines:
                match = re.search(entry["pattern"], line)
                if match:
                    return "%s (%s)" % (match.expand(entry["text"]), line.strip()[:300])
        return ""

    def mark_failed(self, record: Record, reason: str, text: str) -> None:
        key = key_of(record["spec"], record["health"])
        entry = {
            "key": key,
            "release": record["release"],
            "tag": record["tag"],
            "digest": record["digest"],
            "reason": reason,
            "text": text[:300],
            "at": utc_now(),
            "by": self.by,
        }
        self.failed = [entry] + [old for old in self.failed if old["key"] != key]

    def forgive(self, record: Record) -> None:
        key = key_of(record["spec"], record["health"])
        self.failed = [e for e in self.failed if e["key"] != key and e.get("release") != record["release"]]

    def undo(self, journal: Record, strict: bool = True) -> str:
        """Traffic goes where it went before the transition; says where that is.

        Not strict: what was there before may be broken too, and that is no reason to stop here.
        """
        record, led = journal["record"], journal["step"] == "switch"
        origin = self.find(journal["from"])
        self.look()
        if journal["legacy"]:
            self.move_back(journal, strict)
            said = "The old container (%s) serves" % ((self.legacy and self.legacy.labels.get("nemo.tag")) or self.name)
        elif origin:
            box = self.boxes.get(origin["release"])
            stood = not box or not box.running
            if stood and self.takes_turns(journal):
                self.stop_failed(journal)
            self.attempt(strict, self.bring_up, origin)
            kept = [origin] if self.takes_turns(journal) else []
            kept += [record] if self.find(record["release"]) and record["release"] in self.boxes else []
            if kept:
                self.docker.restart_policy(RESTART, *[self.box_name(entry) for entry in kept])
            # One that stood may have come back on another port.
            if (led or journal.get("held") or stood) and self.proxy.is_set_up():
                self.proxy.switch(journal["proxy"], origin["slot"], self.ports)
            problem = self.problem(origin)
            state = (
                "is not healthy (%s)" % problem if problem else "serves again" if led or stood else "served all through"
            )
            said = "The release before it, %s, %s" % (label_of(origin), state)
        else:
            self.proxy.remove()
            said = "There was no release before it, so nothing serves now"
        box = self.boxes.get(record["release"]) or self.inspect(record)
        if led and origin and box and box.running:
            self.drain(record["slot"])
        if self.find(record["release"]):
            if box and (box.running or box.status == "restarting"):
                self.docker.stop(box.name, int(record["settings"]["stop_timeout"]))
        else:
            if box and box.running:
                self.docker.stop(box.name, int(record["settings"]["stop_timeout"]))
            if box:
                self.docker.remove(box.name)
            self.store.delete_release(record["release"])
        return said

    def stop_failed(self, journal: Record) -> None:
        """What failed makes room for what served before. Nobody waits for what it has begun."""
        record = journal["record"]
        box = self.inspect(record)
        if not box or not (box.running or box.status == "restarting"):
            return
        if journal["step"] == "switch" and journal["proxy"].get("retry_after") and self.proxy.is_set_up():
            try:
                self.proxy.hold(record["slot"])
            except OSError as error:  # of its command socket; what served before must not wait for that
                self.warnings.append("HAProxy could not be told: %s" % error)
        self.docker.stop(box.name, int(record["settings"]["stop_timeout"]))

    def attempt(self, strict: bool, action: Callable[[Record], None], record: Record) -> None:
        try:
            action(record)
        except ReleaseError as error:
            if strict:
                raise
            self.warnings.append("the release that was there does not become healthy: %s" % error.text)

    def wait_legacy(self, old: Record) -> None:
        """By its own address, as new connections to the public port may still be led around it."""
        health = old.get("health") or health_of(self.params)
        public = old.get("settings") or self.wanted_public
        question = question_of({"path": health["path"], "status": health["status"]})
        until = self.clock() + health["timeout"]
        while True:
            box = self.docker.containers([self.name]).get(self.name)
            if box and box.address:
                address, port = box.address, box.inside.get(public["port"], public["port"])
            else:
                address, port = self.local(public.get("bind_address") or public.get("address") or ""), public["port"]
            problem = self.probe(address, port, question, 5.0)
            # Of a container of other origin nobody knows what a good answer is.
            if problem is None or (not old and problem.startswith("it answered")):
                return
            if self.clock() >= until:
                raise ReleaseError("unhealthy", "the old container gives no healthy answer: %s" % problem)
            self.sleep(health["interval"])

    # -- health

    @staticmethod
    def local(address: str) -> str:
        return "127.0.0.1" if address in ("0.0.0.0", "") else "::1" if address == "::" else address

    def problem_of(self, address: str, port: int, record: Record) -> str | None:
        health = record["health"]
        return self.probe(address, port, question_of(health), request_timeout(health))

    def problem(self, record: Record) -> str | None:
        return self.problem_of("127.0.0.1", record["host_port"], record)

    def is_serving(self, record: Record) -> bool:
        lost = self.store.missing_secrets(record["release"], record["settings"]["secrets"])
        if lost:
            self.recovered("%s had lost the files of %s and is replaced" % (self.name, ", ".join(lost)))
            return False
        if self.problem(record) is None:
            return True
        try:
            self.prove(record, settle=0, fresh=False)
        except ReleaseError as error:
            if error.reason != "unhealthy":
                raise
            self.recovered("%s was not healthy and is replaced: %s" % (self.name, error.text))
            return False
        return True

    def alive(self, record: Record, restarts: int | None) -> Container:
        box = self.inspect(record)
        if box is None:
            raise ReleaseError("unhealthy", "the container has disappeared")
        if not box.running or (restarts is not None and box.restarts > restarts):
            raise ReleaseError("unhealthy", self.death(box, record["settings"]))
        return box

    def prove(self, record: Record, settle: float | None = None, fresh: bool = True) -> None:
        """Healthy within its time, then so without a break for a while, then equal to a request of its users.

        A fresh one was just started, so that the engine counts its restarts from zero.
        """
        health = record["health"]
        settle = health["settle"] if settle is None else settle
        question = question_of(health)
        limit = self.clock() + health["timeout"] + settle
        restarts = 0 if fresh else self.alive(record, None).restarts
        last: dict[str, float] = next((entry["durations"] for entry in self.releases if entry.get("durations")), {})
        phases = Phases(self.params["phases"] or [], last, self.clock())
        good: float | None = None
        shown = None
        while True:
            problem = self.probe(
                "127.0.0.1", record["host_port"], question, min(request_timeout(health), health["timeout"])
            )
            box = self.alive(record, restarts)
            now = self.clock()
            if problem is None:
                if good is None:
                    good = now
                    phases.end(now)
                    phases.name = ""
                if now - good >= settle:
                    break
            else:
                # A connection that fails does so in many ways while a release starts, and all say the same.
                kind = problem if problem.startswith("it") else "no answer"
                if kind != shown:
                    self.say("not healthy yet: %s" % problem)
                    shown = kind
                good = None
                if phases.due(now):
                    # Not what it said when it ran before.
                    said = phases.look(self.docker.log(box.name, LOG_SEARCHED, box.started), now)
                    if said:
                        self.say(said)
                if now >= limit:
                    text = "%s on its port %d gave no healthy answer within %s s: %s" % (
                        question.text, record["host_port"], health["timeout"], problem,
                    )  # fmt: skip
                    text += "; it was in the phase: %s" % phases.text(now) if phases.name else ""
                    raise ReleaseError("unhealthy", text)
            self.sleep(health["interval"])
        smoke = health.get("smoke") or {}
        if smoke:
            request: Question = question_of(smoke)
            problem = self.probe("127.0.0.1", record["host_port"], request, float(smoke.get("timeout") or 30))
            if problem:
                raise ReleaseError("unhealthy", "the smoke request %s failed: %s" % (request.text, problem))
        took = round((good or self.clock()) - phases.began, 1)
        self.say("healthy after %.1f s%s" % (took, phases.before(HEALTHY)))
        if fresh:
            record["durations"] = dict(phases.durations, **{HEALTHY: took})

    @staticmethod
    def death(live: Container, settings: Settings) -> str:
        if live.oom_killed:
            return "it was killed for using more memory than its %d MiB" % (settings["memory"] >> 20)
        if live.running:
            return "it ended, and was started again by the engine"
        if live.error:
            return "it could not run: %s" % live.error
        return "it ended with status %d" % live.exit_code

    def bake(self, record: Record) -> None:
        """Real traffic goes to it, and the old release still runs: the last moment in which to turn back costs nothing."""
        seconds = self.params["bake_time"]
        if not seconds:
            return
        self.say("watching it for %s s" % seconds)
        slot = record["slot"]
        until = self.clock() + seconds
        restarts = self.alive(record, None).restarts
        first = self.proxy.counters(slot)
        seen = dict(first or {})
        lost = 0
        while True:
            try:
                self.alive(record, restarts)
            except ReleaseError as error:
                if error.reason != "unhealthy":
                    raise
                raise ReleaseError("bake", "%s, with traffic on it" % error.text, error.log_tail) from error
            now = self.proxy.counters(slot)
            if now is not None:
                # Each worker counts for itself: one of before a reload may end, one that is started again counts anew.
                first = now if first is None else first
                seen.update(now)
            before = list((first or {}).values())
            total = sum(entry.total for entry in seen.values()) - sum(entry.total for entry in before)
            errors = sum(entry.errors for entry in seen.values()) - sum(entry.errors for entry in before)
            share = 100.0 * errors / total if total else 0.0
            if total >= self.params["bake_min_requests"] and share > self.params["bake_error_percent"]:
                text = "%d of %d requests failed (%.1f %%); allowed: %s %%"
                raise ReleaseError("bake", text % (errors, total, share, self.params["bake_error_percent"]))
            problem = self.problem(record)
            lost = lost + 1 if problem else 0
            if lost >= PROBES_LOST:
                raise ReleaseError("bake", "it is no longer healthy: %s" % problem)
            if self.clock() >= until:
                self.say("%d requests in the time of its watch, %d failed" % (total, errors))
                return
            self.sleep(min(0.5, max(0.05, until - self.clock())))

    # -- before anything is touched

    def need_on_host(self, settings: Settings) -> None:
        """What the engine would only miss when the old release has stopped already."""
        for mount in settings.get("mounts") or []:
            if not os.path.exists(mount["source"]):
                text = "%s, which the container sees as %s, is not on this host"
                raise ReleaseError("mount", text % (mount["source"], mount["target"]))
        runtime = settings.get("runtime")
        if runtime:
            known = sorted(self.docker.info().get("Runtimes") or {})
            if runtime not in known:
                text = "the Docker Engine has no runtime %s; allowed: %s"
                raise ReleaseError("runtime", text % (runtime, ", ".join(known) or "none"))

    def preflight(self) -> None:
        info = self.docker.info()
        self.server = "%s/%s" % (info.get("OSType", "linux"), architecture(info.get("Architecture", "")))
        self.image_folders = image_folders(info)
        total = info.get("MemTotal") or 0
        memory = parse_size(self.params["memory"])
        if total and memory > total:
            text = "memory is %s; allowed: at most the %d MiB that this host has" % (self.params["memory"], total >> 20)
            raise ReleaseError("memory", text)
        port = self.params["port"]
        own = self.public is not None and self.proxy.is_set_up()
        if own or (self.legacy and self.legacy.running and port in self.legacy.ports):
            return
        holders = self.docker.publishers(port)
        holder = (
            "container %s" % ", ".join(holders) if holders else self.find_listener(self.params["bind_address"], port)
        )
        if holder:
            raise ReleaseError("port_taken", "port %d is taken by %s" % (port, holder))

    def need_memory(self, record: Record) -> None:
        """Two releases of one service run at once for a while."""
        total, available = self.memory()
        need = int(record["settings"]["memory"])
        reserve = self.params["reserve_memory_mb"] << 20
        others = self.docker.containers(self.docker.of_service(None))
        promised = sum(
            entry.memory for entry in others.values() if entry.running and entry.release != record["release"]
        )
        if not total:
            return
        text = "a second release does not fit beside the first: it may use %d MiB, and %s"
        if promised + need + reserve > total:
            why = "of the host's %d MiB the services that run may use %d, with %d in reserve"
            raise ReleaseError("memory", text % (need >> 20, why % (total >> 20, promised >> 20, reserve >> 20)))
        if available < need:
            why = "only %d MiB of the host are free" % (available >> 20)
            raise ReleaseError("memory", text % (need >> 20, why))

    def fetch(self, digest: str | None) -> Record:
        """The image, pulled where it is not here yet."""
        repository, tag = self.params["image"], self.params["tag"]
        reference = "%s@%s" % (repository, digest) if digest else "%s:%s" % (repository, tag)
        image = None
        if digest:
            # An image that was loaded from a file has no digest of a registry; its id says as much.
            image = self.docker.image(reference) or self.docker.image(digest)
        if not image:
            self.need_space()
            self.say("pulling %s" % reference)
            try:
                self.pull(reference)
            except ReleaseError as error:
                local = self.docker.image(reference) if not digest and error.reason == "not_found" else None
                if not local:
                    raise
                image = local  # made on this host: no registry has it
            image = image or self.docker.image(reference)
        if not image:
            raise ReleaseError("not_found", "%s was pulled, and is gone again" % reference)
        return image

    def pull(self, reference: str) -> None:
        try:
            self.docker.pull(reference, self.params["pull_timeout"])
        except ReleaseError as error:
            if "no basic auth" not in error.text:
                raise
            # A credential helper that is too slow, on a host with much to do, looks like one that has nothing.
            self.sleep(2)
            self.docker.pull(reference, self.params["pull_timeout"])

    def check_platform(self, image: Record, wanted: Settings) -> None:
        platform = "%s/%s" % (image.get("Os", "linux"), architecture(image.get("Architecture", "")))
        if platform != self.server:
            text = "%s:%s is built for %s, this host is %s"
            raise ReleaseError("platform", text % (wanted["image"], wanted["tag"], platform, self.server))

    def resolved(self, image: Record) -> str:
        for entry in image.get("RepoDigests") or []:
            repository, _at, digest = entry.rpartition("@")
            if repository == self.params["image"]:
                return str(digest)
        return str(image["Id"])

    def need_space(self) -> None:
        wanted = self.params["min_free_disk_mb"]
        if self.least_free()[0] >= wanted:
            return
        self.images_lock.release()
        self.prune()
        self.lock_images()
        free, folder = self.least_free()
        if free < wanted:
            text = "no space left to pull: %s has %d MB free; allowed: %d MB or more" % (folder, free, wanted)
            raise ReleaseError("no_space", text)

    def least_free(self) -> tuple[float, str]:
        """Megabytes of the fuller one of the folders that a pull fills."""
        found = [(math.inf, "")]
        for folder in self.image_folders:
            try:
                state = os.statvfs(folder)
            except OSError:
                continue
            found.append((state.f_bavail * state.f_frsize // 1000000, folder))
        return min(found)

    def new_record(self, settings: Settings, image: Record) -> Record:
        return {
            "format": FORMAT,
            "service": self.name,
            "release": "%s-%s" % (time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()), random_source.token_hex(3)),
            "image": settings["image"],
            "image_id": image["Id"],
            "tag": settings["tag"],
            "digest": settings["digest"],
            "spec": spec_of(settings),
            "settings": settings,
            "health": health_of(self.params),
            "by": self.by,
            "host_port": 0,
            "slot": SLOTS[0],
        }

    def prune(self) -> None:
        """Images of this repository that no container and no kept release needs; not while another run pulls."""
        lock = Lock(self.store.images_lock_path)
        if not lock.try_acquire():
            lock.release()
            return
        repositories = {self.params["image"]} | {entry["image"] for entry in self.releases}
        candidates: set[str] = set()
        for repository in sorted(name for name in repositories if name):
            candidates |= self.docker.images(repository)
        try:
            candidates -= self.store.needed_images()
        except ReleaseError as error:  # another service's record: who knows what that needs
            self.warnings.append("no image is removed: %s" % error.text)
            candidates = set()
        if candidates:
            for image in sorted(candidates - self.docker.used_images()):
                self.docker.remove_image(image)
        lock.release()
