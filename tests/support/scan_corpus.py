"""A labelled corpus for `ringfence scan`: files as the real tools write them, with generated secrets and look-alikes.

Nothing in it is real: each secret is made of a seeded random source, with the checksum of its kind. Each case names the
reader that has to find it. The corpus grows by seeds, so thousands of cases differ in their values.
"""

from __future__ import annotations

import base64
import json
import random
import sqlite3
import string
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from ringfence.scan.checksums import base62

_ALNUM = string.ascii_letters + string.digits
_HEX = "0123456789abcdef"
_BASE64 = _ALNUM + "+/"
_URL_SAFE = _ALNUM + "-_"


@dataclass(frozen=True)
class Secret:
    """One planted secret: its value, and the pattern that the finding must have."""

    value: str
    pattern: str


@dataclass(frozen=True)
class Case:
    """One file of the corpus: what has to be found in it, or nothing."""

    reader: str
    path: str
    content: bytes
    secrets: tuple[Secret, ...] = ()
    label: str = ""
    """The class for measurements: the reader, or the kind for plain text."""


class Maker:
    """Makes secrets from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def chars(self, alphabet: str, length: int) -> str:
        """Random characters, with a digit and letters among them where the alphabet has both."""
        while True:
            text = "".join(self.random.choice(alphabet) for _ in range(length))
            mixed = any(map(str.isdigit, alphabet)) and any(map(str.isalpha, alphabet))
            if length < 8 or not mixed or (any(map(str.isdigit, text)) and any(map(str.isalpha, text))):
                return text

    def token(self, length: int = 40) -> str:
        return self.chars(_ALNUM, length)

    def password(self) -> str:
        return self.chars(_ALNUM + "!%^*_+=-", self.random.randint(10, 20)).replace("--", "x-") + "7q"

    def crc_token(self, prefix: str) -> str:
        body = self.token(30)
        return f"{prefix}_{body}{base62(zlib.crc32(body.encode()), 6)}"

    def aws_id(self, prefix: str = "AKIA") -> str:
        return prefix + self.chars(string.ascii_uppercase + "234567", 16)

    def aws_secret(self) -> str:
        return self.chars(_BASE64, 40)

    def jwt(self, **claims: object) -> str:
        def part(value: object) -> str:
            return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

        claims = {"iss": "https://idp.test", "sub": "maria@corp.test", "exp": 1999999999, **claims}
        return f"{part({'alg': 'RS256', 'typ': 'JWT'})}.{part(claims)}.{self.chars(_URL_SAFE, 342)}"

    def ssh_key(self) -> str:
        key = ed25519.Ed25519PrivateKey.from_private_bytes(self.random.randbytes(32))
        return key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        ).decode()

    def locked_ssh_key(self) -> str:
        """In the form of PROTOCOL.key, with a cipher; what is encrypted is random."""

        def field(value: bytes) -> bytes:
            return len(value).to_bytes(4, "big") + value

        options = field(self.random.randbytes(16)) + (16).to_bytes(4, "big")
        public = field(field(b"ssh-ed25519") + field(self.random.randbytes(32)))
        body = (
            b"openssh-key-v1\0"
            + field(b"aes256-ctr")
            + field(b"bcrypt")
            + field(options)
            + (1).to_bytes(4, "big")
        )
        text = base64.b64encode(body + public + field(self.random.randbytes(144))).decode()
        lines = "\n".join(text[at : at + 70] for at in range(0, len(text), 70))
        return f"-----BEGIN OPENSSH PRIVATE KEY-----\n{lines}\n-----END OPENSSH PRIVATE KEY-----\n"

    def pem(self) -> str:
        key = ec.derive_private_key(self.random.getrandbits(250) + 1, ec.SECP256R1())
        return key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()


def pem_body(pem: str) -> str:
    """The base64 of a PEM file, which is the secret."""
    return "".join(line for line in pem.strip().splitlines() if not line.startswith("-----"))


S, U, A, P, OTHER = "static-key", "user-token", "service-account", "password", "other"
Build = Callable[[Maker], Case]
_BUILDERS: list[Build] = []


def case(build: Build) -> Build:
    _BUILDERS.append(build)
    return build


def _of(reader: str, path: str, text: str | bytes, *secrets: tuple[str, str], label: str = "") -> Case:
    content = text.encode() if isinstance(text, str) else text
    return Case(reader, path, content, tuple(Secret(*one) for one in secrets), label or reader)


# --- agents and MCP clients -------------------------------------------------------------------------------------------

_MCP_JSON = {
    "mcp-claude-desktop": (".config/Claude/claude_desktop_config.json", "mcpServers"),
    "mcp-claude-code": (".claude.json", "mcpServers"),
    "mcp-cursor": (".cursor/mcp.json", "mcpServers"),
    "mcp-vscode": (".vscode/mcp.json", "servers"),
    "mcp-windsurf": (".codeium/windsurf/mcp_config.json", "mcpServers"),
    "mcp-zed": (".config/zed/settings.json", "context_servers"),
    "mcp-gemini-cli": (".gemini/settings.json", "mcpServers"),
    "mcp-qwen-code": (".qwen/settings.json", "mcpServers"),
    "mcp-cline": ("saoudrizwan.claude-dev/settings/cline_mcp_settings.json", "mcpServers"),
    "mcp-roo-code": ("rooveterinaryinc.roo-cline/settings/mcp_settings.json", "mcpServers"),
    "mcp-amazon-q": (".aws/amazonq/mcp.json", "mcpServers"),
    "mcp-junie": (".junie/mcp/mcp.json", "mcpServers"),
    "mcp-lm-studio": (".lmstudio/mcp.json", "mcpServers"),
    "mcp-kiro": (".kiro/settings/mcp.json", "mcpServers"),
    "mcp-copilot-cli": (".copilot/mcp-config.json", "mcpServers"),
    "mcp-opencode": (".config/opencode/opencode.json", "mcp"),
    "mcp-crush": (".config/crush/crush.json", "mcp"),
    "mcp-amp": (".config/amp/settings.json", "amp.mcpServers"),
    "mcp-continue-json": (".continue/config.json", "mcpServers"),
}


def _mcp_case(reader: str, path: str, table: str) -> Build:
    def build(make: Maker) -> Case:
        github, key, bearer, password = make.crc_token("ghp"), make.token(32), make.token(43), make.password()
        document = {
            table: {
                "github": {
                    "command": "npx",
                    "args": ["-y", "@modelcontextprotocol/server-github"],
                    "env": {"GITHUB_PERSONAL_ACCESS_TOKEN": github, "LOG_LEVEL": "debug"},
                },
                "search": {"command": "uvx", "args": ["search-server", "--api-key", key]},
                "remote": {
                    "url": "https://mcp.corp.test/mcp",
                    "headers": {"Authorization": f"Bearer {bearer}"},
                },
                "database": {
                    "command": "npx",
                    "args": ["server-postgres", f"postgresql://app:{password}@db.corp.test:5432/shop"],
                },
                "referenced": {"command": "npx", "env": {"API_TOKEN": "${env:API_TOKEN}"}},
            }
        }
        text = (
            "// settings\n" + json.dumps(document, indent=2)
            if "zed" in reader
            else json.dumps(document, indent=2)
        )
        return _of(reader, path, text, (github, S), (key, S), (bearer, S), (password, P), label="mcp clients")

    return build


for _reader, (_path, _table) in _MCP_JSON.items():
    case(_mcp_case(_reader, _path, _table))


@case
def _codex(make: Maker) -> Case:
    key, github = make.token(40), make.crc_token("ghp")
    return _of("mcp-codex", ".codex/config.toml", f'''model = "gpt-5"
[mcp_servers.docs]
command = "npx"
args = ["-y", "docs-server"]
[mcp_servers.docs.env]
DOCS_API_KEY = "{key}"
[mcp_servers.github]
url = "https://api.githubcopilot.com/mcp/"
bearer_token_env_var = "GITHUB_TOKEN"
http_headers = {{ "X-Token" = "{github}" }}
''', (key, S), (github, S), label="mcp clients")  # fmt: skip


@case
def _continue(make: Maker) -> Case:
    key = f"sk-ant-api03-{make.chars(_URL_SAFE, 93)}AA"
    return _of("mcp-continue", ".continue/config.yaml", f"""name: Local
models:
  - name: Claude
    provider: anthropic
    apiKey: {key}
mcpServers:
  - name: notes
    command: npx
    env:
      NOTES_TOKEN: ${{{{ secrets.NOTES_TOKEN }}}}
""", (key, S), label="mcp clients")  # fmt: skip


@case
def _goose(make: Maker) -> Case:
    key, other = make.token(40), make.token(36)
    return _of("mcp-goose", ".config/goose/config.yaml", f"""GOOSE_PROVIDER: openai
OPENAI_API_KEY: {key}
extensions:
  jira:
    cmd: uvx
    args: [mcp-jira]
    envs:
      JIRA_API_TOKEN: {other}
    type: stdio
""", (key, S), (other, S), label="mcp clients")  # fmt: skip


@case
def _aider(make: Maker) -> Case:
    key = make.token(48)
    return _of(
        "mcp-aider",
        ".aider.conf.yml",
        f"model: sonnet\nopenai-api-key: {key}\n",
        (key, S),
        label="mcp clients",
    )


@case
def _claude_login(make: Maker) -> Case:
    access = f"sk-ant-oat01-{make.chars(_URL_SAFE, 93)}AA"
    refresh = f"sk-ant-ort01-{make.chars(_URL_SAFE, 93)}AA"
    document = {"claudeAiOauth": {"accessToken": access, "refreshToken": refresh, "expiresAt": 1999999999000,
                                  "scopes": ["user:inference"], "subscriptionType": "max"}}  # fmt: skip
    return _of("agent-login", ".claude/.credentials.json", json.dumps(document), (access, U), (refresh, U))


@case
def _codex_login(make: Maker) -> Case:
    token, refresh = make.jwt(), make.chars(_URL_SAFE, 60)
    document = {
        "OPENAI_API_KEY": None,
        "tokens": {"id_token": token, "refresh_token": refresh, "account_id": "5b1f"},
    }
    return _of("agent-login", ".codex/auth.json", json.dumps(document, indent=2), (token, U), (refresh, U))


@case
def _copilot_login(make: Maker) -> Case:
    token = make.crc_token("ghu")
    document = {
        "github.com:Iv1.b507a08c87ecfe98": {"user": "maria", "oauth_token": token, "githubAppId": "Iv1.b5"}
    }
    return _of("agent-login", ".config/github-copilot/apps.json", json.dumps(document), (token, U))


# --- clouds -----------------------------------------------------------------------------------------------------------


@case
def _aws(make: Maker) -> Case:
    secret, session_secret, session = make.aws_secret(), make.aws_secret(), make.chars(_BASE64, 356)
    text = f"""[default]
aws_access_key_id = {make.aws_id()}
aws_secret_access_key = {secret}

[admin]
aws_access_key_id={make.aws_id("ASIA")}
aws_secret_access_key={session_secret}
aws_session_token={session}
"""
    ids = [line.rpartition("=")[2].strip() for line in text.splitlines() if "key_id" in line]
    return _of("aws-credentials", ".aws/credentials", text, (secret, S), (session_secret, U), (session, U), (ids[0], S),
               (ids[1], U))  # fmt: skip


@case
def _aws_sso(make: Maker) -> Case:
    token, refresh, secret = make.chars(_URL_SAFE, 300), make.chars(_URL_SAFE, 300), make.jwt()
    document = {"startUrl": "https://corp.awsapps.test/start", "region": "eu-west-1", "accessToken": token,
                "expiresAt": "2030-01-01T00:00:00Z", "refreshToken": refresh, "clientSecret": secret}  # fmt: skip
    name = make.chars(_HEX, 40)
    return _of(
        "aws-cache",
        f".aws/sso/cache/{name}.json",
        json.dumps(document),
        (token, U),
        (refresh, U),
        (secret, U),
    )


@case
def _gcloud(make: Maker) -> Case:
    refresh = f"1//0{make.chars(_URL_SAFE, 90)}"
    document = {"client_id": "764086051850-6qr4p6gpi6hn506pt8ejuq83di341hur.apps.googleusercontent.com",
                "client_secret": "d-FL95Q19q7MQmFpd7hHD0Ty", "quota_project_id": "shop", "refresh_token": refresh,
                "type": "authorized_user"}  # fmt: skip
    return _of(
        "gcloud", ".config/gcloud/application_default_credentials.json", json.dumps(document), (refresh, U)
    )


@case
def _gcloud_database(make: Maker) -> Case:
    refresh = f"1//0{make.chars(_URL_SAFE, 90)}"
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE credentials (account_id TEXT PRIMARY KEY, value BLOB)")
    value = json.dumps({"client_id": "3.apps", "refresh_token": refresh, "type": "authorized_user"})
    connection.execute("INSERT INTO credentials VALUES (?, ?)", ("maria@corp.test", value))
    connection.commit()
    return _of("gcloud", ".config/gcloud/credentials.db", connection.serialize(), (refresh, U))


@case
def _gcp_service_account(make: Maker) -> Case:
    pem = make.pem()
    document = {"type": "service_account", "project_id": "shop", "private_key_id": make.chars(_HEX, 40),
                "private_key": pem, "client_email": "deploy@shop.iam.gserviceaccount.com",
                "token_uri": "https://oauth2.googleapis.com/token"}  # fmt: skip
    return _of(
        "gcp-service-account", "keys/shop-4f1.json", json.dumps(document, indent=2), (pem_body(pem), A)
    )


@case
def _azure(make: Maker) -> Case:
    access, refresh = make.jwt(scp="user_impersonation"), f"0.A{make.chars(_URL_SAFE, 400)}"
    document = {
        "AccessToken": {"a": {"secret": access, "home_account_id": "1.2", "realm": "t", "target": "https://management"}},
        "RefreshToken": {"r": {"secret": refresh, "home_account_id": "1.2"}},
        "Account": {"x": {"home_account_id": "1.2", "username": "maria@corp.test"}},
    }  # fmt: skip
    return _of("azure", ".azure/msal_token_cache.json", json.dumps(document), (access, U), (refresh, U))


@case
def _azure_principal(make: Maker) -> Case:
    secret = make.chars(_ALNUM + "~._", 40)
    document = [{"client_id": "8d3c", "tenant": "t-1", "client_secret": secret}]
    return _of("azure", ".azure/service_principal_entries.json", json.dumps(document), (secret, A))


@case
def _kubeconfig(make: Maker) -> Case:
    account = make.jwt(sub="system:serviceaccount:ci:deployer", iss="kubernetes/serviceaccount")
    pem = make.pem()
    data = base64.b64encode(pem.encode()).decode()
    return _of("kubeconfig", ".kube/config", f"""apiVersion: v1
kind: Config
clusters:
- name: prod
  cluster: {{server: "https://prod.k8s.test:6443"}}
contexts:
- name: prod
  context: {{cluster: prod, user: deployer}}
current-context: prod
users:
- name: deployer
  user:
    token: {account}
- name: maria
  user:
    client-certificate-data: {base64.b64encode(b"-----BEGIN CERTIFICATE-----").decode()}
    client-key-data: {data}
""", (account, A), (pem_body(pem), U))  # fmt: skip


@case
def _service_account(make: Maker) -> Case:
    token = make.jwt(sub="system:serviceaccount:default:agent", **{"kubernetes.io": {"namespace": "default"}})
    return _of("service-account", "var/run/secrets/kubernetes.io/serviceaccount/token", token, (token, A))


@case
def _mounted_secret(make: Maker) -> Case:
    value = make.token(32)
    return _of("mounted-secret", "run/secrets/api_key", value + "\n", (value, S))


# --- containers, forges, databases ------------------------------------------------------------------------------------


@case
def _docker(make: Maker) -> Case:
    password, identity = make.password(), make.token(60)
    auth = base64.b64encode(f"maria:{password}".encode()).decode()
    document = {"auths": {"registry.corp.test": {"auth": auth}, "corp.azurecr.io": {"identitytoken": identity}},
                "credsStore": "desktop"}  # fmt: skip
    return _of("docker", ".docker/config.json", json.dumps(document, indent=1), (password, P), (identity, U))


@case
def _gh(make: Maker) -> Case:
    token = make.crc_token("gho")
    return _of("github-cli", ".config/gh/hosts.yml", f"""github.com:
    git_protocol: https
    users:
        maria:
            oauth_token: {token}
    oauth_token: {token}
    user: maria
""", (token, U))  # fmt: skip


@case
def _glab(make: Maker) -> Case:
    token = f"glpat-{make.chars(_URL_SAFE, 20)}"
    return _of("gitlab-cli", ".config/glab-cli/config.yml", f"""git_protocol: ssh
hosts:
    gitlab.corp.test:
        token: {token}
        api_host: gitlab.corp.test
        user: maria
""", (token, S))  # fmt: skip


@case
def _git_credentials(make: Maker) -> Case:
    token, password = make.crc_token("ghp"), make.token(14)
    text = f"https://maria:{token}@github.com\nhttps://maria:{password}@git.corp.test\n"
    return _of("git-credentials", ".git-credentials", text, (token, S), (password, P))


@case
def _git_config(make: Maker) -> Case:
    token, header = f"glpat-{make.chars(_URL_SAFE, 20)}", make.token(30)
    basic = base64.b64encode(f"x:{header}".encode()).decode()
    return _of("git-config", "repository/.git/config", f"""[core]
\tbare = false
[remote "origin"]
\turl = https://oauth2:{token}@gitlab.com/corp/shop.git
\tfetch = +refs/heads/*:refs/remotes/origin/*
[http "https://git.corp.test/"]
\textraheader = AUTHORIZATION: basic {basic}
""", (token, S), (header, P))  # fmt: skip


@case
def _netrc(make: Maker) -> Case:
    password, other = make.token(18), make.token(24)
    return _of("netrc", ".netrc", f"machine api.corp.test login maria password {password}\nmachine git.corp.test\n"
               f"  login bot\n  password {other}\n", (password, P), (other, P))  # fmt: skip


@case
def _pgpass(make: Maker) -> Case:
    password = make.token(16)
    return _of("pgpass", ".pgpass", f"# hosts\ndb.corp.test:5432:shop:app:{password}\n", (password, P))


@case
def _mysql(make: Maker) -> Case:
    password = make.token(16)
    return _of(
        "mysql", ".my.cnf", f'[client]\nuser=app\nhost=db.corp.test\npassword="{password}"\n', (password, P)
    )


@case
def _npm(make: Maker) -> Case:
    token, other, password = make.crc_token("npm"), make.token(44), make.token(20)
    encoded = base64.b64encode(password.encode()).decode()
    return _of("npm", ".npmrc", f"""//registry.npmjs.org/:_authToken={token}
//npm.corp.test/:_authToken={other}
//old.corp.test/:username=maria
//old.corp.test/:_password={encoded}
//ci.corp.test/:_authToken=${{NPM_TOKEN}}
""", (token, S), (other, S), (password, P))  # fmt: skip


@case
def _pypirc(make: Maker) -> Case:
    body = (
        base64.urlsafe_b64encode(b"\x02\x01\x08pypi.org\x02" + make.random.randbytes(120))
        .decode()
        .rstrip("=")
    )
    token, password = f"pypi-{body}", make.token(20)
    return _of("pypi", ".pypirc", f"""[distutils]
index-servers = pypi
[pypi]
username = __token__
password = {token}
[corp]
repository = https://pypi.corp.test
username = maria
password = {password}
""", (token, S), (password, P))  # fmt: skip


@case
def _pip(make: Maker) -> Case:
    password = make.token(20)
    return _of("pypi", ".config/pip/pip.conf", f"[global]\nindex-url = https://maria:{password}@pypi.corp.test/simple\n",
               (password, P))  # fmt: skip


@case
def _cargo(make: Maker) -> Case:
    token, other = f"cio{make.token(32)}", make.token(40)
    return _of("cargo", ".cargo/credentials.toml", f'[registry]\ntoken = "{token}"\n'
               f'[registries.corp]\ntoken = "{other}"\n',
               (token, S), (other, S))  # fmt: skip


@case
def _maven(make: Maker) -> Case:
    password = make.token(20)
    return _of("maven", ".m2/settings.xml", f"""<settings xmlns="http://maven.apache.org/SETTINGS/1.0.0"><servers>
<server><id>corp</id><username>maria</username><password>{password}</password></server>
<server><id>other</id><username>m</username><password>{{COQLCE6DU6GtcS5P=}}</password></server>
</servers></settings>
""", (password, P))  # fmt: skip


@case
def _gradle(make: Maker) -> Case:
    password = make.token(20)
    return _of(
        "gradle",
        ".gradle/gradle.properties",
        f"org.gradle.daemon=true\ncorpPassword={password}\n",
        (password, P),
    )


@case
def _terraform(make: Maker) -> Case:
    token = f"{make.token(14)}.atlasv1.{make.token(67)}"
    document = {"credentials": {"app.terraform.io": {"token": token}}}
    return _of("terraform", ".terraform.d/credentials.tfrc.json", json.dumps(document), (token, S))


@case
def _tfstate(make: Maker) -> Case:
    password = make.token(24)
    document = {"version": 4, "resources": [{"type": "aws_db_instance", "name": "shop", "instances": [
        {"attributes": {"username": "app", "password": password, "port": 5432}}]}]}  # fmt: skip
    return _of("terraform", "infra/terraform.tfstate", json.dumps(document, indent=2), (password, P))


@case
def _tfvars(make: Maker) -> Case:
    password = make.token(24)
    return _of(
        "terraform", "infra/prod.tfvars", f'region = "eu-west-1"\ndb_password = "{password}"\n', (password, P)
    )


@case
def _vault(make: Maker) -> Case:
    token = f"hvs.{make.chars(_URL_SAFE, 90)}"
    return _of("vault", ".vault-token", token, (token, U))


@case
def _ssh(make: Maker) -> Case:
    key = make.ssh_key()
    return _of("ssh-key", ".ssh/id_ed25519", key, (pem_body(key), S))


@case
def _ssh_locked(make: Maker) -> Case:
    key = make.locked_ssh_key()
    return _of("ssh-key", ".ssh/id_locked", key, (pem_body(key), OTHER))


# --- what machines run ------------------------------------------------------------------------------------------------


@case
def _dotenv(make: Maker) -> Case:
    stripe, password, secret = f"sk_live_{make.token(24)}", make.password(), make.token(48)
    return _of("dotenv", "app/.env", f"""# settings
DEBUG=true
PORT=8080
STRIPE_KEY={stripe}
DATABASE_URL="postgres://app:{password}@db.corp.test/shop"
export SESSION_SECRET='{secret}'
API_TOKEN=your-token-here
""", (stripe, S), (password, P), (secret, U))  # fmt: skip


@case
def _bashrc(make: Maker) -> Case:
    key, password = make.token(40), make.token(18)
    return _of("shell", ".bashrc", f"""alias ll='ls -l'
export CORP_API_KEY="{key}"
curl -u maria:{password} https://api.corp.test/v1
export PATH=$HOME/bin:$PATH
""", (key, S), (password, P))  # fmt: skip


@case
def _ci(make: Maker) -> Case:
    token, key = make.crc_token("ghp"), make.token(40)
    return _of("ci", "repository/.github/workflows/release.yml", f"""on: push
jobs:
  release:
    runs-on: ubuntu-latest
    env:
      DEPLOY_TOKEN: {key}
      NPM_TOKEN: ${{{{ secrets.NPM_TOKEN }}}}
    steps:
      - uses: actions/checkout@v4
      - run: |
          curl -H "Authorization: token {token}" https://api.github.com/repos/corp/shop/releases
""", (token, S), (key, S))  # fmt: skip


@case
def _gitlab_ci(make: Maker) -> Case:
    password = make.token(20)
    return _of("ci", "repository/.gitlab-ci.yml", f"""variables:
  REGISTRY_PASSWORD: {password}
build:
  script:
    - docker login -u ci -p $REGISTRY_PASSWORD registry.corp.test
""", (password, P))  # fmt: skip


@case
def _compose(make: Maker) -> Case:
    password, key = make.token(20), make.token(40)
    return _of("compose", "app/docker-compose.yml", f"""services:
  db:
    image: postgres:17
    environment:
      POSTGRES_USER: app
      POSTGRES_PASSWORD: {password}
  web:
    environment:
      - SECRET_KEY={key}
      - OTHER_KEY=${{OTHER_KEY}}
""", (password, P), (key, S))  # fmt: skip


@case
def _kubernetes(make: Maker) -> Case:
    password, key = make.token(20), make.token(40)
    encoded = base64.b64encode(password.encode()).decode()
    return _of("kubernetes", "deploy/app.yaml", f"""apiVersion: v1
kind: Secret
metadata: {{name: db}}
type: Opaque
data:
  username: {base64.b64encode(b"app").decode()}
  password: {encoded}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web}}
spec:
  template:
    spec:
      serviceAccountName: web
      containers:
      - name: web
        image: registry.corp.test/web:1
        env:
        - name: API_KEY
          value: {key}
        - name: DB_PASSWORD
          valueFrom: {{secretKeyRef: {{name: db, key: password}}}}
""", (password, P), (key, S))  # fmt: skip


@case
def _helm(make: Maker) -> Case:
    password = make.token(20)
    return _of("helm-values", "chart/values.yaml", f"""image: {{tag: 1.2.3}}
postgresql:
  auth:
    username: app
    password: {password}
    existingSecret: db-credentials
""", (password, P))  # fmt: skip


@case
def _systemd(make: Maker) -> Case:
    key, token = make.token(40), make.token(30)
    return _of("systemd", "etc/systemd/system/agent.service", f"""[Unit]
Description=agent
[Service]
Environment="AGENT_API_KEY={key}" LOG=debug
EnvironmentFile=/etc/agent/env
ExecStart=/usr/bin/agent --token {token} --port 8080
""", (key, S), (token, S))  # fmt: skip


@case
def _crontab(make: Maker) -> Case:
    password, token = make.token(20), make.token(32)
    return _of("crontab", "etc/cron.d/backup", f"""SHELL=/bin/sh
BACKUP_PASSWORD={password}
0 3 * * * root curl -H 'X-Api-Key: {token}' https://backup.corp.test/run
""", (password, P), (token, S))  # fmt: skip


# --- plain text -------------------------------------------------------------------------------------------------------


def _text(
    label: str, pattern: str, make_value: Callable[[Maker], str], line: str = 'CLIENT = "{}"\n'
) -> None:
    def build(make: Maker) -> Case:
        value = make_value(make)
        text = "import os\n\n# how it is used\n" + line.replace("{}", value) + "print('done')\n"
        return _of("text", "src/client.py", text, (value, pattern), label=f"text: {label}")

    case(build)


_text("GitHub", S, lambda make: make.crc_token("ghp"))
_text("GitHub fine-grained", S, lambda make: f"github_pat_{make.token(22)}_{make.token(59)}")
_text("GitLab", S, lambda make: f"glpat-{make.chars(_URL_SAFE, 20)}")
_text("AWS key id", S, lambda make: make.aws_id())
_text("Anthropic", S, lambda make: f"sk-ant-api03-{make.chars(_URL_SAFE, 93)}AA")
_text("OpenAI", S, lambda make: f"sk-proj-{make.token(74)}T3BlbkFJ{make.token(73)}")
_text("Google API key", S, lambda make: f"AIza{make.chars(_URL_SAFE, 35)}")
_text(
    "Slack",
    S,
    lambda make: (
        f"xoxb-{make.chars(string.digits[1:], 12)}-{make.chars(string.digits[1:], 13)}-{make.token(24)}"
    ),
)
_text("Stripe", S, lambda make: f"sk_live_{make.token(24)}")
_text("SendGrid", S, lambda make: f"SG.{make.token(22)}.{make.token(43)}")
_text("npm", S, lambda make: make.crc_token("npm"))
_text("Hugging Face", S, lambda make: f"hf_{make.chars(string.ascii_letters, 34)}")
_text("DigitalOcean", S, lambda make: f"dop_v1_{make.chars(_HEX, 64)}")
_text("Vault", U, lambda make: f"hvs.{make.chars(_URL_SAFE, 90)}")
_text("JWT", U, lambda make: make.jwt())
_text("URL", P, lambda make: make.token(16), 'connect("postgres://app:{}@db.corp.test:5432/shop")\n')
_text("API key by name", S, lambda make: make.token(32), 'API_KEY = "{}"\n')
_text("secret by name", S, lambda make: make.chars(_HEX, 40), "const clientSecret = '{}';\n")
_text("password by name", P, lambda make: make.token(14), 'db.connect(user="app", password="{}")\n')


@case
def _text_pem(make: Maker) -> Case:
    pem = make.pem()
    return _of("text", "certs/server.key", pem, (pem_body(pem), S), label="text: private key")


# --- look-alikes: nothing is to be found ------------------------------------------------------------------------------

_LOOKALIKE_LINES: tuple[Callable[[Maker], str], ...] = (
    lambda make: f'checksum = "sha256:{make.chars(_HEX, 64)}"',
    lambda make: f'commit = "{make.chars(_HEX, 40)}"',
    lambda make: 'API_KEY = os.environ["API_KEY"]',
    lambda make: 'password = getpass("Password: ")',
    lambda make: 'API_KEY = "your-api-key-here"',
    lambda make: 'SECRET_KEY = "${SECRET_KEY}"',
    lambda make: 'token_type = "Bearer"',
    lambda make: 'url = "postgres://user:password@localhost/db"',
    lambda make: 'password = "changeme"',
    lambda make: f'request_id = "{uuid.UUID(int=make.random.getrandbits(128), version=4)}"',
    lambda make: 'aws_access_key_id = "AKIAIOSFODNN7EXAMPLE"',
    lambda make: 'secret_name = "projects/shop/secrets/db"',
    lambda make: 'max_tokens = "4096"',
    lambda make: 'PASSWORD_FILE = "/run/secrets/db_password"',
    lambda make: f'token = "ghp_{make.token(29)}x{make.token(6)}"  # a wrong checksum',
    lambda make: f'integrity = "sha512-{make.chars(_BASE64, 86)}=="',
    lambda make: 'label = {"password": "Password", "token": "Token"}',
    lambda make: 'csrf_token = "{{ csrf_token }}"',
    lambda make: 'tokenizer = "cl100k_base_tokenizer_v2"',
    lambda make: f'public_key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{make.token(43)}"',
)


def _lookalike(number: int) -> Build:
    def build(make: Maker) -> Case:
        line = _LOOKALIKE_LINES[number](make)
        return _of("text", f"lookalikes/file{number}.py", f"import os\n{line}\n", label="look-alikes")

    return build


for _number in range(len(_LOOKALIKE_LINES)):
    case(_lookalike(_number))


@case
def _lookalike_yaml(make: Maker) -> Case:
    return _of("text", "lookalikes/config.yaml", f"""password: ${{DB_PASSWORD}}
token: !vault secret/app
secretName: app-credentials
apiKeyRef: {{name: app, key: token}}
digest: sha256:{make.chars(_HEX, 64)}
tokenUrl: https://idp.corp.test/oauth/token
auth: basic
""", label="look-alikes")  # fmt: skip


@case
def _lookalike_env(make: Maker) -> Case:
    return _of("dotenv", "lookalikes/.env.example", """API_KEY=your-api-key
DB_PASSWORD=changeme
TOKEN=<token>
SECRET=
AUTH_MODE=password
PASSWORD_MIN_LENGTH=12
""", label="look-alikes")  # fmt: skip


def cases(seed: int) -> list[Case]:
    """Every case once, with the values of this seed."""
    return [build(Maker(seed * 1000 + number)) for number, build in enumerate(_BUILDERS)]


def plant(folder: Path, seeds: int) -> Iterator[tuple[Path, Case]]:
    """Write a corpus of so many seeds, a folder for each case, and yield path and case."""
    for seed in range(seeds):
        for number, one in enumerate(cases(seed)):
            path = folder / f"s{seed:03d}" / f"c{number:03d}" / one.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(one.content)
            yield path, one
