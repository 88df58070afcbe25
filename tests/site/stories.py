"""What stands before the commands of pages that begin in the middle, and what stands in the place of their placeholders."""

from __future__ import annotations

from dataclasses import dataclass, field

_MY_BOT = """\
ringfence key new my-bot.json --id agent/my-bot
ringfence agent register my-bot --description "my first agent" --key-file my-bot.json --allow 'platform:read,deploy:env/staging/*'
TASK=$(ringfence --json --identity .ringfence/users/maria.json task assign my-bot --purpose "try it" --allow 'platform:read,deploy:env/staging/*' --for 30m | jq -r .task_id)
"""
_ASSIGN = (
    'ringfence --identity .ringfence/users/maria.json task assign my-bot --purpose "try it" '
    "--allow 'platform:read,deploy:env/staging/*' --for 30m"
)
_AS_ALI = "export RINGFENCE_IDENTITY=.ringfence/users/ali.json\n"


@dataclass(frozen=True)
class Story:
    """How a page is run on a fresh `ringfence dev`."""

    before: str = ""
    replaced: dict[str, str] = field(default_factory=dict)


STORIES: dict[str, Story] = {
    "tutorial.md": Story(
        replaced={
            _ASSIGN: f"TASK=$({_ASSIGN.replace('ringfence ', 'ringfence --json ', 1)} | jq -r .task_id)",
            "--task TASK": '--task "$TASK"',
            "ringfence approvals approve REQUEST": "until REQUEST=$(ringfence --json approvals list | jq -er "
            "'.[0].request_id'); do sleep 1; done; ringfence approvals approve \"$REQUEST\" --yes",
        },
    ),
    "delegation.md": Story(
        before=_MY_BOT
        + "ringfence key new helper-bot.json --id agent/helper-bot\n"
        + "ringfence agent register helper-bot --description helps --key-file helper-bot.json --allow 'platform:read:env/**'\n",
        replaced={
            "ringfence --identity my-bot.json task delegate TASK helper-bot --purpose \"look first\" "
            "--allow 'platform:read:env/staging/*' --for 10m": "PART=$(ringfence --json --identity my-bot.json task delegate "
            "\"$TASK\" helper-bot --purpose \"look first\" --allow 'platform:read:env/staging/*' --for 10m | jq -r .task_id)",
            "--task PART": '--task "$PART"',
            "task end PART": 'task end "$PART"',
        },
    ),
    "inventory.md": Story(),
    "audit.md": Story(before=_AS_ALI),
    "audit-trail.md": Story(before=_AS_ALI),
    "gateway-report.md": Story(before=_AS_ALI),
}  # fmt: skip
"""By page. Every other page with commands says itself why no test here runs them."""
