"""The pages whose commands run on a `ringfence dev` that they share, and what the test has in the place of a reader."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Story:
    """What a page takes for done, and what stands in the place of its placeholders."""

    before: str = ""
    replaced: dict[str, str] = field(default_factory=dict)


_READER = "source tests/site/reader.sh\n"
_CREDENTIAL = _READER + "source .ringfence/dev.sh\ncredential\n"
_SOCKET = {
    "curl --unix-socket .ringfence/tasks/$TASK.sock http": 'socket "$TASK"; '
    "curl --unix-socket .ringfence/tasks/$TASK.sock http"
}
_ASSIGN = (
    'ringfence --identity .ringfence/users/maria.json task assign tour-bot --purpose "try it" '
    "--allow 'platform:read,deploy:env/staging/*' --for 30m"
)

GROUPS: dict[str, dict[str, Story]] = {
    "an agent": {
        "docs/agents/README.md": Story(before=_READER, replaced=_SOCKET),
    },
    "the audit trail": {
        "docs/delegation.md": Story(),
        "docs/inventory.md": Story(before=_CREDENTIAL),
        "docs/audit.md": Story(before=_CREDENTIAL),
        "docs/asking-audit.md": Story(
            before=_CREDENTIAL,
            replaced={
                "tail --code 'action.*' --status failure": "tail --code 'action.*' --status failure --no-follow",
                "--severity medium --since 1h": "--severity medium --since 1h --no-follow",
            }
        ),
        "docs/gateway-report.md": Story(
            before=_READER + "source .ringfence/dev.sh\nreported 127.0.0.1:9001\n",
            replaced={
                "ringfence serve gateway": "served 127.0.0.1:8726 ringfence serve gateway"
            },
        ),
        "docs/lifecycle.md": Story(),
        "docs/audit-trail.md": Story(),
        "docs/scan.md": Story(before="mkdir -p ~/projects\n"),
        "docs/adopt.md": Story(),
        "docs/leases-in-redis.md": Story(before="source .ringfence/dev.sh\n"),
    },
    "approvals": {
        "docs/tutorial.md": Story(
            before=_READER,
            replaced={
                _ASSIGN: f"TASK=$({_ASSIGN.replace('ringfence ', 'ringfence --json ', 1)} | jq -r .task_id)",
                "--task TASK": '--task "$TASK"',
                "curl --unix-socket .ringfence/tasks/TASK.sock": 'socket "$TASK"; curl --unix-socket .ringfence/tasks/$TASK.sock',
                "ringfence approvals approve REQUEST": "until REQUEST=$(ringfence --json approvals list | jq -er "
                "'.[0].request_id'); do sleep 1; done; ringfence approvals approve \"$REQUEST\" --yes",
            },
        ),
        "docs/approvals.md": Story(
            before=_READER,
            replaced={
                "ringfence approvals watch": "alike && watched ringfence approvals watch",
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
            before=_READER,
            replaced=_SOCKET,
        ),
        "docs/http-access.md": Story(
            before=_READER,
            replaced={
                "export RINGFENCE_DOOR=unix": 'socket "$TASK"; export RINGFENCE_DOOR=unix',
                "$ ID=$(": '$ python -m tests.site.given request "$TASK" "$RINGFENCE_IDENTITY"\n$ ID=$(',
            },
        ),
    },
    "users": {
        "docs/sponsors/README.md": Story(),
        "docs/security/README.md": Story(),
        "README.md": Story(before=_READER, replaced=_SOCKET),
        "docs/users.md": Story(
            before=_READER + "python -m tests.site.given login\n",
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
            before=_READER,
            replaced={
                "ringfence serve signals > signals.log 2>&1 &": "served 127.0.0.1:8709 "
                "ringfence serve signals > signals.log 2>&1"
            },
        ),
        "docs/mcp-servers.md": Story(
            before="python -m tests.site.given notes\n",
            replaced={"/srv/notes/bin/python /srv/notes/notes.py": ".venv/bin/python notes.py"},
        ),
        "docs/passkeys.md": Story(
            before=_READER,
            replaced={
                "user invite pia ": "user invite pia && enrolled ",
                "ringfence approvals approve REQUEST --passkey": 'touched ringfence approvals approve "$REQUEST" --passkey --yes',
                "$ ringfence approvals list --passkey": "$ pia_is_asked\n$ ringfence approvals list --passkey",
                "$ ringfence init --sign-origin": "$ another\n$ ringfence init --sign-origin",
                "RINGFENCE_TRUST_ROOT=…": "RINGFENCE_TRUST_ROOT=$ROOT",
                "RINGFENCE_SIGN_PAGE_ORIGIN=https://sign.example.com ringfence": "RINGFENCE_SIGN_PAGE_ORIGIN=https://sign.example.com "
                "page_served 127.0.0.1:8711 ringfence",
            },
        ),
    },
}  # fmt: skip
"""By group, a stack each: its pages, from the root of the repository. No two of a group make something of one name."""
