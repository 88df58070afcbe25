"""Secrets are known by their forms in what people, agents and libraries say; what is none stays as it was said."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ringfence.audit.events.ocsf import scrubbed
from ringfence.kernel.base.secret_refs import without_secrets
from ringfence.kernel.service.process import redact

MARK = "Canary0Canary0Canary0Canary0Canary0Canary0Canary0Canary0"
SAID = {
    "AWS": f"with AKIA{MARK.upper():.16} please",
    "GitHub": f"it is ghp_{MARK[:36]}.",
    "GitHub, fine": f"(github_pat_{MARK})",
    "GitLab": f"glpat-{MARK[:20]}",
    "Slack": f"xoxb-{MARK[:24]}",
    "sk": f"key sk-ant-{MARK}",
    "Stripe": f"sk_live_{MARK[:24]}",
    "Google": f"AIza{MARK[:35]}",
    "OpenBao": f"s.{MARK[:24]}",
    "Vault": f"hvs.{MARK}",
    "webhook": f"whsec_{MARK}==",
    "PEM": f"-----BEGIN EC PRIVATE KEY-----\n{MARK}\n-----END EC PRIVATE KEY-----",
    "PEM, cut off": f"-----BEGIN PRIVATE KEY-----\n{MARK}",
    "database": f"cannot connect to postgres://app:{MARK[:9]}@db.example:5432/shop",
    "Redis": f"redis://:{MARK[:9]}@cache.example:6379/0 is away",
    "header": f"sent Authorization: Bearer {MARK}",
    "Basic": f"basic {MARK[:20]}==",
    "environment": f"PGPASSWORD={MARK[:9]} psql",
    "quoted": f"client_secret = '{MARK[:9]}'",
    "JSON": f'{{"access_token": "{MARK[:9]}"}}',
    "phrase": f"password = correct {MARK[:9]} battery staple",
    "phrase, quoted": f"passphrase='correct {MARK[:9]} battery staple'",
    "phrase, escaped": f'{{"secret": "co\\"rrect {MARK[:9]} staple"}}',
    "phrase, single letters": f"pass_phrase=a b c {MARK[:9]} d",
    "phrase, before another": f"db_password=correct {MARK[:9]} staple user=app",
    "phrase in a URL": f"postgres://app:correct {MARK[:9]} staple@db.example/shop",
    "query": f"https://api.example/x?api_key={MARK[:9]}&page=2",
    "query, with a hyphen": f"https://api.example/x?api-key={MARK[:9]}&page=2",
}
HARMLESS = (
    "release 421: deploy to staging, see https://ci.example/builds/421?page=2#log",
    "the token of agent bot has ended; the secret: nobody asked",
    "ask sam@example.com, or git@github.com:acme/shop.git, or ssh://git@git.example/shop",
    "staging does not allow write on env/production/web at spiffe://acme.example/agent/deploy-bot",
    "621faa025d3e55cbd799749c3eb3d997ade2735d36a39a201962720c4a749f10 and 5d35cb05-b1f2-512b-8944-82df23812053",
    "http://db.example:5432 is away, ask sam@example.com; https://x.example:443, or ali@example.com",
    "a basic understanding of task-based skills; AKIAs are keys",
)


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_text_shaped_like_a_secret_is_redacted(said: str) -> None:
    found = (scrubbed(said), str(redact(None, "", {"event": said})["event"]), without_secrets(said))
    for text in found:
        assert "Canary" not in text
        assert "CANARY" not in text
        assert "[redacted]" in text


@pytest.mark.parametrize(
    "end", [" user=app host=db", " --host=db", "\nthe next line", "; then", "&page=2", ", and so on"]
)
def test_a_phrase_ends_where_the_next_setting_begins(end: str) -> None:
    assert without_secrets(f"password=correct horse battery staple{end}") == f"password=[redacted]{end}"


@pytest.mark.parametrize("said", HARMLESS)
def test_harmless_text_is_unchanged(said: str) -> None:
    assert without_secrets(said) == said
    assert scrubbed(said) == said


LONG = """
from ringfence.audit.events.ocsf import scrubbed
from ringfence.kernel.service.process import redact

for piece in (
    "a", "a.", "-", "_", "'", ":", "://", "://a:", "a@", "token", "token=", "bearer ", "AKIA", "whsec_", "s.",
    "password=", "password=a ", "password=a b=", "secret='\\\\", "://a:b ",
    "-----BEGIN ", "-----BEGIN PRIVATE KEY-----", 'passwd"', "=",
):
    for end in ("", ".."):
        redact(None, "", {"event": piece * (200_000 // len(piece)) + end})
        scrubbed(piece * (2_000 // len(piece)) + end)
"""


def test_a_long_word_is_not_looked_at_from_each_of_its_letters_on() -> None:
    """It took a hundred milliseconds for a reason of two kilobytes, and a minute for what was logged of fifty."""
    subprocess.run([sys.executable, "-c", LONG], check=True, timeout=60)
