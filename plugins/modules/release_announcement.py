#!/usr/bin/python
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Documentation of the action release_announcement; its code is plugins/action/release_announcement.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release_announcement
short_description: Tell a webhook what came of a release
version_added: 0.2.0
author: The nemo platform project (@nemo-platform)
description:
  - Posts one JSON object about what M(nemo.platform.container_release) did on this host, from the controller.
  - A webhook that does not take it is a warning and never an error. The address appears in no message.
  - Announces nothing where nothing was changed, and nothing in check mode.
  - The object has the keys C(service), C(host), C(by), C(kind) (the module's C(action)), C(result) (V(ok) or V(failed)), C(tag),
    C(digest), C(image), C(previous) (the tag that a rollback goes back to), C(reason), C(text) (why it failed, one line), C(seconds)
    and C(at) (UTC), and the same in a sentence, for chat services, under the name that O(text_key) gives.
options:
  url:
    description: Address of the webhook, C(https://) or C(http://). Nothing is announced when it is empty. It counts as a secret.
    type: str
    required: true
  service:
    description: The service.
    type: str
    required: true
  operator:
    description: Who releases.
    type: str
    default: ""
  tag:
    description: The tag that was asked for; the result of a failed release does not have it.
    type: str
    default: ""
  digest:
    description: Its digest.
    type: str
    default: ""
  result:
    description: What M(nemo.platform.container_release) returned, a failure too.
    type: dict
    required: true
  text_key:
    description: Key of the sentence. Slack and Mattermost read V(text), which then is not why it failed; Discord reads V(content).
    type: str
    default: sentence
  timeout:
    description: Seconds for one attempt.
    type: float
    default: 5
  retries:
    description: Number of further attempts, a second apart, after an error of the network or a status of 429 or 500 and above.
    type: int
    default: 2
attributes:
  check_mode:
    description: Announces nothing.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: The release is announced
  nemo.platform.release_announcement:
    url: "{{ vault_release_webhook }}"
    service: ai-prod
    operator: alice
    tag: prod-20250718-1040
    result: "{{ released }}"
  no_log: true
"""

RETURN = r"""
announced:
  description: Whether the webhook took it.
  returned: always
  type: bool
"""
