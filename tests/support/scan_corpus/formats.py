"""Planted credentials in plain text: one case for each format, and for each form of it."""

from __future__ import annotations

import base64
import string
from collections.abc import Callable

from tests.support.scan_corpus.maker import (
    BASE36,
    BASE64,
    HEX,
    UPPER36,
    URL_SAFE,
    A,
    Case,
    Maker,
    P,
    S,
    U,
    case,
    of,
    pem_body,
)


def _text(
    label: str, pattern: str, make_value: Callable[[Maker], str], line: str = 'CLIENT = "{}"\n'
) -> None:
    def build(make: Maker) -> Case:
        value = make_value(make)
        text = "import os\n\n# how it is used\n" + line.replace("{}", value) + "print('done')\n"
        return of("text", "src/client.py", text, (value, pattern), label=f"text: {label}")

    case(build)


FORMAT_CASES: tuple[tuple[str, str, Callable[[Maker], str]], ...] = (
    ("GitHub", S, lambda make: make.crc_token("ghp")),
    ("GitHub fine-grained", S, lambda make: f"github_pat_{make.token(22)}_{make.token(59)}"),
    ("GitHub OAuth", U, lambda make: make.crc_token("gho")),
    ("GitHub user of an App", U, lambda make: make.crc_token("ghu")),
    ("GitHub refresh", U, lambda make: make.crc_token("ghr", 70)),
    ("GitHub App", A, lambda make: make.crc_token("ghs")),
    ("GitLab", S, lambda make: f"glpat-{make.chars(URL_SAFE, 20)}"),
    ("GitLab routable", S, lambda make: f"glpat-{make.token(27)}.01.{make.chars(BASE36, 9)}"),
    ("GitLab deploy", A, lambda make: f"gldt-{make.chars(URL_SAFE, 20)}"),
    ("GitLab runner", A, lambda make: f"glrt-{make.chars(URL_SAFE, 20)}"),
    ("GitLab CI job", A, lambda make: f"glcbt-{make.chars(HEX, 2)}_{make.chars(URL_SAFE, 20)}"),
    ("GitLab trigger", A, lambda make: f"glptt-{make.chars(HEX, 40)}"),
    ("AWS key id", S, lambda make: make.aws_id()),
    ("AWS session id", U, lambda make: make.aws_id("ASIA")),
    ("Google API key", S, lambda make: f"AIza{make.chars(URL_SAFE, 35)}"),
    ("Google access token", U, lambda make: f"ya29.{make.chars(URL_SAFE, 180)}"),
    ("Google OAuth client", A, lambda make: f"GOCSPX-{make.chars(URL_SAFE, 28)}"),
    ("Anthropic", S, lambda make: f"sk-ant-api03-{make.chars(URL_SAFE, 93)}AA"),
    ("Anthropic admin", S, lambda make: f"sk-ant-admin01-{make.chars(URL_SAFE, 93)}AA"),
    ("Anthropic login", U, lambda make: f"sk-ant-oat01-{make.chars(URL_SAFE, 93)}AA"),
    ("OpenAI", S, lambda make: f"sk-proj-{make.token(74)}T3BlbkFJ{make.token(73)}"),
    ("OpenAI service account", S, lambda make: f"sk-svcacct-{make.token(74)}T3BlbkFJ{make.token(73)}"),
    ("OpenAI admin", S, lambda make: f"sk-admin-{make.token(58)}T3BlbkFJ{make.token(58)}"),
    ("OpenAI legacy", S, lambda make: f"sk-{make.token(20)}T3BlbkFJ{make.token(20)}"),
    ("OpenRouter", S, lambda make: f"sk-or-v1-{make.chars(HEX, 64)}"),
    ("Groq", S, lambda make: f"gsk_{make.token(52)}"),
    ("xAI", S, lambda make: f"xai-{make.token(80)}"),
    ("Perplexity", S, lambda make: f"pplx-{make.token(48)}"),
    ("Replicate", S, lambda make: f"r8_{make.token(37)}"),
    ("Hugging Face", S, lambda make: f"hf_{make.chars(string.ascii_letters, 34)}"),
    ("Slack", S, lambda make: f"xoxb-{make.digits(12)}-{make.digits(13)}-{make.token(24)}"),
    (
        "Slack user",
        S,
        lambda make: f"xoxp-{make.digits(11)}-{make.digits(12)}-{make.digits(13)}-{make.chars(HEX, 32)}",
    ),
    (
        "Slack app",
        S,
        lambda make: f"xapp-1-A{make.chars(UPPER36, 10)}-{make.digits(13)}-{make.chars(HEX, 64)}",
    ),
    ("Stripe", S, lambda make: f"sk_live_{make.token(24)}"),
    ("Stripe restricted", S, lambda make: f"rk_live_{make.token(99)}"),
    ("SendGrid", S, lambda make: f"SG.{make.token(22)}.{make.token(43)}"),
    ("npm", S, lambda make: make.crc_token("npm")),
    ("PyPI", S, lambda make: make.pypi_token()),
    ("crates.io", S, lambda make: f"cio{make.token(32)}"),
    ("RubyGems", S, lambda make: f"rubygems_{make.chars(HEX, 48)}"),
    ("Docker", S, lambda make: f"dckr_pat_{make.chars(URL_SAFE, 26)}k"),
    ("Docker organization", S, lambda make: f"dckr_oat_{make.chars(URL_SAFE, 31)}k"),
    ("DigitalOcean", S, lambda make: f"dop_v1_{make.chars(HEX, 64)}"),
    ("DigitalOcean OAuth", S, lambda make: f"doo_v1_{make.chars(HEX, 64)}"),
    ("DigitalOcean refresh", S, lambda make: f"dor_v1_{make.chars(HEX, 64)}"),
    ("Vault", U, lambda make: f"hvs.{make.chars(URL_SAFE, 90)}"),
    ("Vault batch", A, lambda make: f"hvb.{make.chars(URL_SAFE, 138)}"),
    ("Databricks", S, lambda make: f"dapi{make.chars(HEX, 32)}-2"),
    ("Linear", S, lambda make: f"lin_api_{make.token(40)}"),
    ("Notion", S, lambda make: f"ntn_{make.token(46)}"),
    ("Atlassian", S, lambda make: f"ATATT3xFfGF0{make.chars(URL_SAFE, 160)}=A{make.chars(HEX, 7).upper()}"),
    ("Grafana", S, lambda make: make.grafana_token()),
    ("Tailscale", S, lambda make: f"tskey-auth-k{make.token(16)}-{make.token(32)}"),
    ("Tailscale API", S, lambda make: f"tskey-api-k{make.token(16)}-{make.token(32)}"),
    ("Tailscale client", S, lambda make: f"tskey-client-k{make.token(16)}-{make.token(32)}"),
    ("Sentry", S, lambda make: f"sntryu_{make.chars(HEX, 64)}"),
    ("Sentry organization", S, lambda make: f"sntrys_{make.sentry_claims()}_{make.chars(BASE64, 43)}"),
    ("Figma", S, lambda make: f"figd_{make.chars(URL_SAFE, 39)}k"),
    ("Supabase", S, lambda make: f"sbp_{make.chars(HEX, 40)}"),
    ("Telegram", S, lambda make: f"{make.digits(10)}:AA{make.chars(URL_SAFE, 32)}k"),
    ("Shopify", S, lambda make: f"shpat_{make.chars(HEX, 32)}"),
    ("Shopify shared secret", S, lambda make: f"shpss_{make.chars(HEX, 32)}"),
    ("Postman", S, lambda make: f"PMAK-{make.chars(HEX, 24)}-{make.chars(HEX, 34)}"),
    ("New Relic", S, lambda make: f"NRAK-{make.chars(UPPER36, 27)}"),
    ("Doppler", S, lambda make: f"dp.pt.{make.token(43)}"),
    ("Doppler service", S, lambda make: f"dp.st.dev_shop.{make.token(43)}"),
    ("Terraform", S, lambda make: f"{make.token(14)}.atlasv1.{make.token(67)}"),
    ("1Password", A, lambda make: make.onepassword_token()),
    ("age", S, lambda make: make.age_key()),
)
for _label, _pattern, _make_value in FORMAT_CASES:
    _text(_label, _pattern, _make_value)
_text(
    "Slack webhook",
    S,
    lambda make: f"T{make.chars(UPPER36, 10)}/B{make.chars(UPPER36, 10)}/{make.token(24)}",
    'HOOK = "https://hooks.slack.com/services/{}"\n',
)
_text(
    "Azure storage",
    A,
    lambda make: base64.b64encode(make.random.randbytes(64)).decode(),
    'CONNECTION = "DefaultEndpointsProtocol=https;AccountName=shop;AccountKey={};EndpointSuffix=core.windows.net"\n',
)
_text("JWT", U, lambda make: make.jwt())
_text("URL", P, lambda make: make.token(16), 'connect("postgres://app:{}@db.corp.test:5432/shop")\n')
_text("API key by name", S, lambda make: make.token(32), 'API_KEY = "{}"\n')
_text("secret by name", S, lambda make: make.chars(HEX, 40), "const clientSecret = '{}';\n")
_text("password by name", P, lambda make: make.token(14), 'db.connect(user="app", password="{}")\n')


@case
def _text_pem(make: Maker) -> Case:
    pem = make.pem()
    return of("text", "certs/server.key", pem, (pem_body(pem), S), label="text: private key")
