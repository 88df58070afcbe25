"""The pages whose commands run on a `ringfence dev` that they share, and what the test has in the place of a reader."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Story:
    """What a page takes for done, and what stands in the place of its placeholders."""

    before: str = ""
    replaced: dict[str, str] = field(default_factory=dict)


_SHELL = """\
# served ADDRESS COMMAND...: a service in the background, ended with this shell; returns once it is ready
served() {
    local ready=$1; shift
    RINGFENCE_HTTP=$ready "$@" & local served=$!
    until curl -sf -o /dev/null "http://$ready/readyz"; do sleep 0.2; kill -0 $served || return; done
}
# watched COMMAND...: run what goes on until Ctrl-C, until it has printed a request
watched() {
    "$@" > watched.txt & local watching=$!
    until grep -q 'approvals approve' watched.txt; do sleep 0.2; kill -0 $watching || return; done
    kill $watching
}
# socket TASK: a gateway opens the socket of a task a moment after it has read the task's first lease
socket() { until [ -S ".ringfence/tasks/$1.sock" ]; do sleep 0.1; done; }
"""
_ACTION_WAITS = """\
action_waits() {
    local may=hub:merge:repos/shop/pulls/7/merge olga=.ringfence/users/olga.json task
    ringfence --identity $olga target add hub --description "the hub" --verb read --verb merge --ask merge \\
        --setting url=https://hub.example \\
        --request 'GET /{path*} read {path*}' --request 'PUT /{path*} merge {path*}' &&
    ringfence --identity $olga user set maria --add $may &&
    ringfence key new merger.json --id agent/merger &&
    ringfence agent register merger --description "merges" --key-file merger.json --allow $may &&
    task=$(ringfence --json --identity .ringfence/users/maria.json task assign merger --purpose "release 421" \\
        --allow $may --for 30m | jq -r .task_id) &&
    ringfence --identity merger.json request --task "$task" --allow $may --reason merge --delivery gateway || return
    socket "$task"
    curl -s --unix-socket .ringfence/tasks/$task.sock -X PUT --json '{}' http://gateway/hub/repos/shop/pulls/7/merge &
    until ringfence --json approvals list | jq -e 'any(.kind == "action")'; do sleep 1; done
}
"""

_PASSKEYS = """\
# enrolled: what pia does in her browser with the invitation
enrolled() { python -m tests.site.given passkey pia "$(ringfence --identity .ringfence/users/olga.json --json user invite pia | jq -r .invitation)"; }
# pia_is_asked: an agent of pia's wants what she has to approve; sets REQUEST
pia_is_asked() {
    local may=platform:deploy:env/staging/web sam=.ringfence/users/sam.json task
    ringfence key new pia-bot.json --id agent/pia-bot &&
    ringfence --identity $sam agent register pia-bot --description "of pia" --key-file pia-bot.json --allow $may &&
    ringfence --identity .ringfence/users/olga.json agent transfer pia-bot --to pia &&
    task=$(ringfence --json --identity .ringfence/users/maria.json task assign pia-bot --purpose "try it" --allow $may \\
        --for 30m | jq -r .task_id) || return
    ringfence --identity pia-bot.json request --task "$task" --allow $may --reason "roll out" --timeout 5m > token.txt &
    until REQUEST=$(ringfence --json approvals list --passkey | jq -er '.[0].request_id'); do sleep 1; done
}
# touched COMMAND...: run it, and sign at the link that it shows
touched() {
    "$@" > asked.txt 2>&1 & local asking=$!
    until grep -q '^http.*#from=' asked.txt; do sleep 0.2; kill -0 $asking || { cat asked.txt >&2; return 1; }; done
    python -m tests.site.given touch pia "$(grep '^http.*#from=' asked.txt)" && wait $asking; local status=$?
    cat asked.txt; return $status
}
# another: an installation of its own, without services, on the same broker
another() {
    local kafka; kafka=$(sed -n 's/^kafka = "\\(.*\\)"/\\1/p' "$RINGFENCE_CONFIG")
    mkdir another && cd another
    unset RINGFENCE_IDENTITY RINGFENCE_USER
    export RINGFENCE_CONFIG=/dev/null RINGFENCE_KAFKA=$kafka RINGFENCE_EMBEDDED_BROKER=true RINGFENCE_TOPIC_PREFIX=another
    export RINGFENCE_TRUST_DOMAIN=example.com
    ROOT=$(ringfence --json init --operator ada | tee init.json | jq -r .trust_root) && export RINGFENCE_TRUST_ROOT=$ROOT
    ringfence topics apply && ringfence init --publish
}
# page_served COMMAND...: the sign page in the background, until it answers
page_served() {
    RINGFENCE_SIGN_PAGE_HTTP=127.0.0.1:8711 "$@" & local served=$!
    until curl -sf -o /dev/null -H 'Host: sign.example.com' "http://127.0.0.1:8711/"; do sleep 0.2; kill -0 $served || return; done
}
"""

_ASSIGN = (
    'ringfence --identity .ringfence/users/maria.json task assign my-bot --purpose "try it" '
    "--allow 'platform:read,deploy:env/staging/*' --for 30m"
)

GROUPS: dict[str, dict[str, Story]] = {
    "an agent": {
        "docs/agents/README.md": Story(),
    },
    "the audit trail": {
        "docs/delegation.md": Story(),
        "docs/inventory.md": Story(),
        "docs/audit.md": Story(),
        "docs/asking-audit.md": Story(
            replaced={
                "tail --code 'action.*' --status failure": "tail --code 'action.*' --status failure --no-follow",
                "--severity medium --since 1h": "--severity medium --since 1h --no-follow",
            }
        ),
        "docs/gateway-report.md": Story(
            before=_SHELL,
            replaced={
                "ringfence serve gateway": "served 127.0.0.1:8726 ringfence serve gateway"
            },
        ),
        "docs/lifecycle.md": Story(),
        "docs/audit-trail.md": Story(),
        "docs/scan.md": Story(before="mkdir -p ~/projects\n"),
    },
    "approvals": {
        "docs/tutorial.md": Story(
            replaced={
                _ASSIGN: f"TASK=$({_ASSIGN.replace('ringfence ', 'ringfence --json ', 1)} | jq -r .task_id)",
                "--task TASK": '--task "$TASK"',
                "ringfence approvals approve REQUEST": "until REQUEST=$(ringfence --json approvals list | jq -er "
                "'.[0].request_id'); do sleep 1; done; ringfence approvals approve \"$REQUEST\" --yes",
            },
        ),
        "docs/approvals.md": Story(
            before=_SHELL + _ACTION_WAITS,
            replaced={
                "ringfence approvals watch": "watched ringfence approvals watch",
                "ACTION=$(": "action_waits && ACTION=$(",
            },
        ),
        "docs/delivery.md": Story(),
        "docs/policy.md": Story(
            replaced={
                "break-glass list --unreviewed": "break-glass list --unreviewed\n"
                "$ until ringfence --json break-glass list | grep -q $REQUEST; do sleep 0.5; done",
            },
        ),
        "docs/gateway.md": Story(
            before=_SHELL,
            replaced={
                "curl --unix-socket .ringfence/tasks/$TASK.sock http": 'socket "$TASK"; '
                "curl --unix-socket .ringfence/tasks/$TASK.sock http"
            },
        ),
        "docs/http-access.md": Story(
            before=_SHELL,
            replaced={
                "export RINGFENCE_DOOR=unix": 'socket "$TASK"; export RINGFENCE_DOOR=unix',
                "$ ID=$(": '$ python -m tests.site.given request "$TASK" "$RINGFENCE_IDENTITY"\n$ ID=$(',
            },
        ),
    },
    "users": {
        "docs/sponsors/README.md": Story(),
        "docs/security/README.md": Story(),
        "README.md": Story(),
        "docs/users.md": Story(
            before=_SHELL + "python -m tests.site.given login\n",
            replaced={
                "ringfence serve scim > scim.log 2>&1 &": "served 127.0.0.1:8708 "
                "ringfence serve scim > scim.log 2>&1",
                "$ ringfence user add-key maria --package passkey-maria.json": "$ python -m tests.site.given attested maria "
                '"$(ringfence --json user invite maria | jq -r .invitation)"\n'
                "$ ringfence user add-key maria --package passkey-maria.json",
            },
        ),
        "docs/instances.md": Story(before="python -m tests.site.given kubernetes\n"),
        "docs/shared-signals.md": Story(
            before=_SHELL,
            replaced={
                "ringfence serve signals > signals.log 2>&1 &": "served 127.0.0.1:8709 "
                "ringfence serve signals > signals.log 2>&1"
            },
        ),
        "docs/mcp-servers.md": Story(),
        "docs/passkeys.md": Story(
            before=_SHELL + _PASSKEYS,
            replaced={
                "user invite pia ": "user invite pia && enrolled ",
                "ringfence approvals approve REQUEST --passkey": 'touched ringfence approvals approve "$REQUEST" --passkey --yes',
                "$ ringfence approvals list --passkey": "$ pia_is_asked\n$ ringfence approvals list --passkey",
                "$ ringfence init --sign-origin": "$ another\n$ ringfence init --sign-origin",
                "RINGFENCE_TRUST_ROOT=…": "RINGFENCE_TRUST_ROOT=$ROOT",
                "RINGFENCE_SIGN_PAGE_ORIGIN=https://sign.example.com ringfence": "RINGFENCE_SIGN_PAGE_ORIGIN=https://sign.example.com "
                "page_served ringfence",
            },
        ),
    },
}  # fmt: skip
"""By group, a stack each: its pages, from the root of the repository. No two of a group make something of one name."""
