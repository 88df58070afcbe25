"""The catalogue of credential kinds: the format of each, its issuer, and how a person revokes it.

Checksums in issued credentials, which distinguish a real token from text of the same format.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from ringfence.scan.findings import Pattern

_BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BECH32: Final = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_BECH32_GENERATORS: Final = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)


def base62(number: int, length: int) -> str:
    """Return a number in base 62 (digits, upper case, lower case), with leading zeros."""
    digits = ""
    while number:
        number, digit = divmod(number, 62)
        digits = _BASE62[digit] + digits
    return digits.rjust(length, "0")


def crc32_base62(token: str) -> bool:
    """Check the last six characters against the CRC-32 of the characters between the prefix and them (GitHub, npm)."""
    body = token.rpartition("_")[2]
    return base62(zlib.crc32(body[:-6].encode()), 6) == body[-6:]


def crc32_hex(token: str) -> bool:
    """Check the last eight characters against the CRC-32 of all before the underscore (Grafana)."""
    body, _, checksum = token.rpartition("_")
    return f"{zlib.crc32(body.encode()):08x}" == checksum.lower()


def aws_account(key_id: str) -> str | None:
    """Return the account number in an AWS access key id; None for ids of the older form, which have none."""
    try:
        raw = base64.b32decode(key_id[4:20])
    except binascii.Error:
        return None
    number = (int.from_bytes(raw[:6], "big") & 0x7FFF_FFFF_FF80) >> 7
    return f"{number:012d}" if 0 < number < 10**12 else None


def macaroon_pypi(token: str) -> bool:
    """Check that the token is a macaroon of pypi.org or test.pypi.org."""
    body = token.removeprefix("pypi-")
    try:
        raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    except (binascii.Error, ValueError):
        return False
    return b"pypi.org" in raw[:24]


def bech32(text: str) -> bool:
    """Check a Bech32 string (BIP 173), such as the secret key of age."""
    text = text.lower()
    prefix, _, data = text.rpartition("1")
    if not prefix or not set(data) <= set(_BECH32):
        return False
    values = [ord(char) >> 5 for char in prefix] + [0] + [ord(char) & 31 for char in prefix]
    values += [_BECH32.index(char) for char in data]
    check = 1
    for value in values:
        top = check >> 25
        check = (check & 0x1FF_FFFF) << 5 ^ value
        for bit, generator in enumerate(_BECH32_GENERATORS):
            if top >> bit & 1:
                check ^= generator
    return check == 1


def jwt_parts(token: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return header and claims of a compact JWS, unverified; None if it is none."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    found = []
    for part in parts[:2]:
        try:
            document = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        except (ValueError, RecursionError):
            return None
        if not isinstance(document, dict):
            return None
        found.append(document)
    return (found[0], found[1]) if "alg" in found[0] else None


def base64_key(token: str) -> bool:
    """Check that the text is base64 of 64 bytes: a key of an Azure storage account."""
    try:
        return len(base64.b64decode(token, validate=True)) == 64
    except (binascii.Error, ValueError):
        return False


Template = Literal["postgres", "mysql", "redis", "ssh", "federation", "http", "mcp", "github-api"]
"""The templates of `ringfence target add`."""


@dataclass(frozen=True, slots=True)
class Kind:
    id: str
    title: str
    pattern: Pattern
    service: str | None = None
    host: str | None = None
    """Where it is presented, if all of this kind go to one host."""
    template: Template = "http"
    revoke_url: str | None = None
    """The page on which its owner ends it."""
    revoke_command: str | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """The format of a kind of credential."""

    kind: Kind
    marker: str
    """A literal part of each; a text without it is not searched."""
    regex: re.Pattern[str]
    """Finds it; group 1 is the secret if there is one."""
    check: Callable[[str], bool] | None = None
    """The checksum inside of it."""
    public: re.Pattern[str] | None = None
    """What is the same at the begin of all of its kind, and so no part of the secret: `tskey-client-`."""


_S, _U, _A, _P = Pattern.STATIC_KEY, Pattern.USER_TOKEN, Pattern.SERVICE_ACCOUNT, Pattern.PASSWORD

PASSWORD = Kind("password", "password", _P)
KEY = Kind("key", "API key or token", _S)
USER_TOKEN = Kind("user-token", "token of a signed-in user", _U)
BASIC_AUTH = Kind("basic-auth", "user name and password", _P)
URL_PASSWORD = Kind("url-password", "password in a URL", _P)
BEARER = Kind("bearer", "bearer token in a header", _S)
PRIVATE_KEY = Kind("private-key", "private key", _S, template="ssh")
SSH_KEY = Kind("ssh-key", "SSH private key without passphrase", _S, "SSH", template="ssh")
SSH_KEY_LOCKED = Kind(
    "ssh-key-encrypted", "SSH private key with passphrase", Pattern.OTHER, "SSH", template="ssh"
)
SSH_AGENT = Kind("ssh-agent", "SSH agent of a signed-in user", _U, "SSH", template="ssh")
AWS_SECRET = Kind(
    "aws-secret-key", "AWS secret access key", _S, "AWS", "amazonaws.com", "federation",
    "https://console.aws.amazon.com/iam/home#/security_credentials",
)  # fmt: skip
AWS_SESSION = Kind("aws-session", "AWS session token", _U, "AWS", "amazonaws.com", "federation")
AWS_SSO = Kind(
    "aws-sso", "AWS IAM Identity Center login", _U, "AWS", "amazonaws.com", "federation",
    revoke_command="aws sso logout",
)  # fmt: skip
GCP_USER = Kind(
    "gcp-user", "Google Cloud login of a user", _U, "Google Cloud", "googleapis.com", "federation",
    "https://myaccount.google.com/permissions", "gcloud auth application-default revoke",
)  # fmt: skip
GCP_SERVICE_ACCOUNT = Kind(
    "gcp-service-account", "Google Cloud service account key", _A, "Google Cloud", "googleapis.com", "federation",
    "https://console.cloud.google.com/iam-admin/serviceaccounts",
)  # fmt: skip
AZURE_USER = Kind(
    "azure-user", "Azure login of a user", _U, "Azure", "management.azure.com", "federation",
    revoke_command="az logout",
)  # fmt: skip
AZURE_SERVICE_PRINCIPAL = Kind(
    "azure-service-principal", "Azure service principal secret", _A, "Azure", "management.azure.com", "federation",
    revoke_command="az account clear",
)  # fmt: skip
KUBERNETES_USER = Kind(
    "kubernetes-user", "Kubernetes user credential", _U, "Kubernetes", template="federation"
)
KUBERNETES_SERVICE_ACCOUNT = Kind(
    "kubernetes-service-account", "Kubernetes service account token", _A, "Kubernetes", template="federation"
)
CLOUD_METADATA = Kind("cloud-metadata", "credentials from cloud metadata", _A, template="federation")
REGISTRY = Kind("registry-password", "container registry password", _P, "container registry")
DATABASE = Kind("database-password", "database password", _P, "PostgreSQL", template="postgres")
MYSQL = Kind("mysql-password", "MySQL password", _P, "MySQL", template="mysql")
OAUTH_LOGIN = Kind("oauth-login", "OAuth login of a user", _U)
GITHUB_LOGIN = Kind(
    "github-login", "GitHub login of a user", _U, "GitHub", "api.github.com", "github-api",
    "https://github.com/settings/applications", "gh auth logout",
)  # fmt: skip
GITLAB_LOGIN = Kind(
    "gitlab-login", "GitLab login of a user", _U, "GitLab", "gitlab.com", "http",
    revoke_command="glab auth logout",
)  # fmt: skip
TERRAFORM = Kind(
    "terraform-token", "Terraform token", _S, "HCP Terraform", "app.terraform.io", "http",
    "https://app.terraform.io/app/settings/tokens",
)  # fmt: skip
VAULT = Kind(
    "vault-token", "Vault or OpenBao token", _U, "Vault", None, "federation",
    revoke_command="vault token revoke -self",
)  # fmt: skip
JWT = Kind("jwt", "JSON Web Token", _U)
EXTERNAL = Kind("external", "credential found by another scanner", Pattern.OTHER)

_FORMATS: list[Format] = []


def _add(
    kind: Kind,
    marker: str,
    regex: str,
    check: Callable[[str], bool] | None = None,
    public: str | None = None,
) -> None:
    _FORMATS.append(
        Format(
            kind,
            marker,
            re.compile(rf"(?<![A-Za-z0-9_-])(?:{regex})(?![A-Za-z0-9_-])"),
            check,
            re.compile(public or re.escape(marker)),
        )
    )


def _key(id: str, service: str, host: str, url: str | None, marker: str, regex: str, **more: object) -> None:
    """Declare a static key of one service."""
    check, public = more.pop("check", None), more.pop("public", None)
    assert check is None or callable(check)
    assert public is None or isinstance(public, str)
    title = str(more.pop("title", f"{service} key"))
    _add(Kind(id, title, _S, service, host, "http", url), marker, regex, check, public)


_GITHUB_PAT = Kind(
    "github-pat", "GitHub personal access token", _S, "GitHub", "api.github.com", "github-api",
    "https://github.com/settings/tokens",
)  # fmt: skip
_GITHUB_APP = Kind(
    "github-app", "GitHub App installation token", _A, "GitHub", "api.github.com", "github-api",
    "https://github.com/settings/installations",
)  # fmt: skip
_add(_GITHUB_PAT, "ghp_", r"ghp_[A-Za-z0-9]{36}", crc32_base62)
_add(_GITHUB_PAT, "github_pat_", r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}")
for _prefix in ("gho", "ghu", "ghr"):
    _add(GITHUB_LOGIN, f"{_prefix}_", rf"{_prefix}_[A-Za-z0-9]{{36,76}}", crc32_base62)
_add(_GITHUB_APP, "ghs_", r"ghs_[A-Za-z0-9]{36}", crc32_base62)
_key("gitlab-pat", "GitLab", "gitlab.com", "https://gitlab.com/-/user_settings/personal_access_tokens", "glpat-",
     r"glpat-[\w-]{20,64}(?:\.[\w.]{2,40})?", title="GitLab personal access token")  # fmt: skip
for _prefix, _what in (
    ("gldt", "deploy token"),
    ("glrt", "runner token"),
    ("glcbt", "CI job token"),
    ("glptt", "trigger token"),
):
    _add(Kind(f"gitlab-{_prefix}", f"GitLab {_what}", _A, "GitLab", "gitlab.com"), f"{_prefix}-",
         rf"{_prefix}-[\w-]{{20,64}}")  # fmt: skip
_AWS_KEY_ID = Kind(
    "aws-access-key", "AWS access key", _S, "AWS", "amazonaws.com", "federation",
    "https://console.aws.amazon.com/iam/home#/security_credentials",
)  # fmt: skip
_add(_AWS_KEY_ID, "AKIA", r"AKIA[A-Z2-7]{16}")
_add(AWS_SESSION, "ASIA", r"ASIA[A-Z2-7]{16}")
_key("google-api-key", "Google", "googleapis.com", "https://console.cloud.google.com/apis/credentials", "AIza",
     r"AIza[\w-]{35}", title="Google API key")  # fmt: skip
_add(GCP_USER, "ya29.", r"ya29\.[\w-]{40,400}")
_add(Kind("google-client-secret", "Google OAuth client secret", _A, "Google Cloud", "googleapis.com", "federation",
          "https://console.cloud.google.com/apis/credentials"), "GOCSPX-", r"GOCSPX-[\w-]{28}")  # fmt: skip
_key("anthropic-key", "Anthropic", "api.anthropic.com", "https://console.anthropic.com/settings/keys", "sk-ant-",
     r"sk-ant-(?:api|admin)\d\d-[\w-]{80,120}", public=r"sk-ant-(?:api|admin)\d\d-")  # fmt: skip
_add(Kind("anthropic-login", "Claude login of a user", _U, "Anthropic", "api.anthropic.com"), "sk-ant-o",
     r"sk-ant-o[ar]t\d\d-[\w-]{80,120}", public=r"sk-ant-o[ar]t\d\d-")  # fmt: skip
_key("openai-key", "OpenAI", "api.openai.com", "https://platform.openai.com/api-keys", "T3BlbkFJ",
     r"sk-(?:(?:proj|svcacct|admin)-)?[\w-]{20,100}T3BlbkFJ[\w-]{20,100}",
     public=r"sk-(?:(?:proj|svcacct|admin)-)?")  # fmt: skip
_key("openrouter-key", "OpenRouter", "openrouter.ai", "https://openrouter.ai/settings/keys", "sk-or-v1-",
     r"sk-or-v1-[0-9a-f]{64}")  # fmt: skip
_key("groq-key", "Groq", "api.groq.com", "https://console.groq.com/keys", "gsk_", r"gsk_[A-Za-z0-9]{52}")
_key("xai-key", "xAI", "api.x.ai", "https://console.x.ai", "xai-", r"xai-[A-Za-z0-9]{80}")
_key("perplexity-key", "Perplexity", "api.perplexity.ai", None, "pplx-", r"pplx-[A-Za-z0-9]{48}")
_key("replicate-token", "Replicate", "api.replicate.com", "https://replicate.com/account/api-tokens", "r8_",
     r"r8_[A-Za-z0-9]{37}")  # fmt: skip
_key("huggingface-token", "Hugging Face", "huggingface.co", "https://huggingface.co/settings/tokens", "hf_",
     r"hf_[A-Za-z]{34}")  # fmt: skip
_key("slack-token", "Slack", "slack.com", "https://api.slack.com/apps", "xox",
     r"xox[abeoprs]-(?:\d{8,14}-){1,3}[A-Za-z0-9-]{16,80}", public=r"xox[abeoprs]-", title="Slack token")  # fmt: skip
_key("slack-app-token", "Slack", "slack.com", "https://api.slack.com/apps", "xapp-",
     r"xapp-\d-[A-Z0-9]{8,14}-\d{10,14}-[a-f0-9]{64}", public=r"xapp-\d-", title="Slack app token")  # fmt: skip
_key("slack-webhook", "Slack", "hooks.slack.com", "https://api.slack.com/apps", "hooks.slack.com/services/",
     r"https://hooks\.slack\.com/services/(T[A-Z0-9]{8,12}/B[A-Z0-9]{8,12}/[A-Za-z0-9]{24})",
     title="Slack webhook")  # fmt: skip
_key("stripe-key", "Stripe", "api.stripe.com", "https://dashboard.stripe.com/apikeys", "_live_",
     r"[sr]k_live_[A-Za-z0-9]{24,100}", public="[sr]k_live_")  # fmt: skip
_key("sendgrid-key", "SendGrid", "api.sendgrid.com", "https://app.sendgrid.com/settings/api_keys", "SG.",
     r"SG\.[\w-]{22}\.[\w-]{43}")  # fmt: skip
_key("npm-token", "npm", "registry.npmjs.org", "https://www.npmjs.com/settings/~/tokens", "npm_",
     r"npm_[A-Za-z0-9]{36}", check=crc32_base62, title="npm token")  # fmt: skip
_key("pypi-token", "PyPI", "upload.pypi.org", "https://pypi.org/manage/account/token/", "pypi-AgE",
     r"pypi-AgE[\w-]{50,1000}", check=macaroon_pypi, title="PyPI token")  # fmt: skip
_key("cargo-token", "crates.io", "crates.io", "https://crates.io/settings/tokens", "cio",
     r"cio[A-Za-z0-9]{32}", title="crates.io token")  # fmt: skip
_key("rubygems-key", "RubyGems", "rubygems.org", "https://rubygems.org/profile/api_keys", "rubygems_",
     r"rubygems_[0-9a-f]{48}")  # fmt: skip
_key("docker-pat", "Docker Hub", "hub.docker.com", "https://app.docker.com/settings/personal-access-tokens",
     "dckr_", r"dckr_(?:pat|oat)_[\w-]{27,36}", public="dckr_(?:pat|oat)_", title="Docker access token")  # fmt: skip
_key("digitalocean-token", "DigitalOcean", "api.digitalocean.com",
     "https://cloud.digitalocean.com/account/api/tokens", "_v1_", r"do[opr]_v1_[0-9a-f]{64}", public="do[opr]_v1_",
     title="DigitalOcean token")  # fmt: skip
_add(VAULT, "hvs.", r"hvs\.[\w-]{24,300}")
_add(Kind("vault-batch", "Vault batch token", _A, "Vault", None, "federation"), "hvb.", r"hvb\.[\w-]{80,300}")
_key("databricks-token", "Databricks", "cloud.databricks.com", None, "dapi", r"dapi[0-9a-f]{32}(?:-\d)?",
     title="Databricks token")  # fmt: skip
_key("linear-key", "Linear", "api.linear.app", "https://linear.app/settings/api", "lin_api_",
     r"lin_api_[A-Za-z0-9]{40}")  # fmt: skip
_key("notion-token", "Notion", "api.notion.com", "https://www.notion.so/profile/integrations", "ntn_",
     r"ntn_[A-Za-z0-9]{46}", title="Notion integration token")  # fmt: skip
_key("atlassian-token", "Atlassian", "api.atlassian.com",
     "https://id.atlassian.com/manage-profile/security/api-tokens", "ATATT3x",
     r"ATATT3x[\w=.-]{100,250}", title="Atlassian API token")  # fmt: skip
_key("grafana-token", "Grafana", "grafana.com", None, "glsa_", r"glsa_[A-Za-z0-9]{32}_[0-9a-fA-F]{8}",
     check=crc32_hex, title="Grafana service account token")  # fmt: skip
_key("tailscale-key", "Tailscale", "api.tailscale.com", "https://login.tailscale.com/admin/settings/keys",
     "tskey-", r"tskey-(?:api|auth|client)-[A-Za-z0-9]{8,20}-[A-Za-z0-9]{20,40}",
     public="tskey-(?:api|auth|client)-")  # fmt: skip
_key("sentry-token", "Sentry", "sentry.io", "https://sentry.io/settings/auth-tokens/", "sntry",
     r"sntryu_[0-9a-f]{64}|sntrys_[\w+/=-]{80,300}", public="sntry[us]_", title="Sentry token")  # fmt: skip
_key("figma-token", "Figma", "api.figma.com", None, "figd_", r"figd_[\w-]{40}", title="Figma token")
_key("supabase-token", "Supabase", "api.supabase.com", "https://supabase.com/dashboard/account/tokens", "sbp_",
     r"sbp_[0-9a-f]{40}", title="Supabase token")  # fmt: skip
_key(
    "telegram-token",
    "Telegram",
    "api.telegram.org",
    None,
    ":AA",
    r"\d{8,10}:AA[\w-]{33}",
    title="Telegram bot token",
)
_key("shopify-token", "Shopify", "myshopify.com", None, "shp", r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",
     public="shp(?:at|ca|pa|ss)_",
     title="Shopify token")  # fmt: skip
_key("postman-key", "Postman", "api.getpostman.com", None, "PMAK-", r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}")
_key("newrelic-key", "New Relic", "api.newrelic.com", None, "NRAK-", r"NRAK-[A-Z0-9]{27}")
_key("doppler-token", "Doppler", "api.doppler.com", None, "dp.",
     r"dp\.(?:pt|st|ct)\.(?:[a-z0-9_-]{2,35}\.)?[A-Za-z0-9]{40,44}", public=r"dp\.(?:pt|st|ct)\.",
     title="Doppler token")  # fmt: skip
_key("terraform-cloud-token", "HCP Terraform", "app.terraform.io", "https://app.terraform.io/app/settings/tokens",
     ".atlasv1.", r"[A-Za-z0-9]{14}\.atlasv1\.[\w=-]{60,80}", title="Terraform token")  # fmt: skip
_add(Kind("onepassword-service-account", "1Password service account token", _A, "1Password", "1password.com"),
     "ops_eyJ", r"ops_eyJ[\w=+/-]{200,1200}")  # fmt: skip
_key("age-key", "age", "", None, "AGE-SECRET-KEY-1", r"AGE-SECRET-KEY-1[02-9AC-HJ-NP-Z]{58}",
     check=bech32, title="age secret key")  # fmt: skip
_add(Kind("azure-storage-key", "Azure storage account key", _A, "Azure", "core.windows.net", "federation"),
     "AccountKey=", r"AccountKey=([A-Za-z0-9+/]{86}==)", base64_key)  # fmt: skip

FORMATS: Final = tuple(_FORMATS)
"""All kinds that can be told by their look alone."""

_WORDS: Final[Mapping[str, tuple[str, str, Template]]] = {
    "github": ("GitHub", "api.github.com", "github-api"),
    "gh": ("GitHub", "api.github.com", "github-api"),
    "gitlab": ("GitLab", "gitlab.com", "http"),
    "openai": ("OpenAI", "api.openai.com", "http"),
    "anthropic": ("Anthropic", "api.anthropic.com", "http"),
    "claude": ("Anthropic", "api.anthropic.com", "http"),
    "gemini": ("Google", "generativelanguage.googleapis.com", "http"),
    "google": ("Google", "googleapis.com", "federation"),
    "gcp": ("Google Cloud", "googleapis.com", "federation"),
    "aws": ("AWS", "amazonaws.com", "federation"),
    "azure": ("Azure", "management.azure.com", "federation"),
    "slack": ("Slack", "slack.com", "http"),
    "stripe": ("Stripe", "api.stripe.com", "http"),
    "jira": ("Atlassian", "api.atlassian.com", "http"),
    "confluence": ("Atlassian", "api.atlassian.com", "http"),
    "notion": ("Notion", "api.notion.com", "http"),
    "linear": ("Linear", "api.linear.app", "http"),
    "brave": ("Brave Search", "api.search.brave.com", "http"),
    "npm": ("npm", "registry.npmjs.org", "http"),
    "postgres": ("PostgreSQL", "", "postgres"),
    "postgresql": ("PostgreSQL", "", "postgres"),
    "pg": ("PostgreSQL", "", "postgres"),
    "redis": ("Redis", "", "redis"),
    "vault": ("Vault", "", "federation"),
    "datadog": ("Datadog", "api.datadoghq.com", "http"),
    "sentry": ("Sentry", "sentry.io", "http"),
    "cloudflare": ("Cloudflare", "api.cloudflare.com", "http"),
    "twilio": ("Twilio", "api.twilio.com", "http"),
    "mysql": ("MySQL", "", "mysql"),
}


def for_name(kind: Kind, words: tuple[str, ...]) -> Kind:
    """Return the kind, with the service that the words of a setting's name show, if they show one."""
    if kind.service is not None:
        return kind
    for word in words:
        if word in _WORDS:
            service, host, template = _WORDS[word]
            return Kind(kind.id, kind.title, kind.pattern, service, host or None, template, kind.revoke_url)
    return kind


SCHEMES: Final[Mapping[str, tuple[str, Template]]] = {
    "postgres": ("PostgreSQL", "postgres"),
    "postgresql": ("PostgreSQL", "postgres"),
    "redis": ("Redis", "redis"),
    "rediss": ("Redis", "redis"),
    "valkey": ("Valkey", "redis"),
    "ssh": ("SSH", "ssh"),
    "sftp": ("SSH", "ssh"),
    "mysql": ("MySQL", "mysql"),
    "mariadb": ("MariaDB", "mysql"),
    "mongodb": ("MongoDB", "http"),
    "mongodb+srv": ("MongoDB", "http"),
    "amqp": ("RabbitMQ", "http"),
    "amqps": ("RabbitMQ", "http"),
    "smtp": ("SMTP", "http"),
    "smtps": ("SMTP", "http"),
    "ftp": ("FTP", "http"),
    "http": ("HTTP", "http"),
    "https": ("HTTP", "http"),
}
"""The service and template of URLs."""
