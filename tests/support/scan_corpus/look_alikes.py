"""Look-alikes: files in the form of each reader and text in the form of each credential, with nothing to be found."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Iterator

from ringfence.scan.kinds import FORMATS, Format
from tests.support.scan_corpus.formats import FORMAT_CASES
from tests.support.scan_corpus.maker import BASE64, HEX, URL_SAFE, Build, Case, Maker, case, of
from tests.support.scan_corpus.planted import MCP_JSON

_LOOKALIKE_LINES: tuple[Callable[[Maker], str], ...] = (
    lambda make: f'checksum = "sha256:{make.chars(HEX, 64)}"',
    lambda make: f'commit = "{make.chars(HEX, 40)}"',
    lambda make: 'API_KEY = os.environ["API_KEY"]',
    lambda make: 'password = getpass("Password: ")',
    lambda make: 'API_KEY = "your-api-key-here"',
    lambda make: 'SECRET_KEY = "${SECRET_KEY}"',
    lambda make: 'token_type = "Bearer"',
    lambda make: 'HOOK = "https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX"',
    lambda make: 'CONNECTION = "AccountName=shop;AccountKey=<key>;EndpointSuffix=core.windows.net"',
    lambda make: 'url = "postgres://user:password@localhost/db"',
    lambda make: 'password = "changeme"',
    lambda make: f'request_id = "{uuid.UUID(int=make.random.getrandbits(128), version=4)}"',
    lambda make: 'aws_access_key_id = "AKIAIOSFODNN7EXAMPLE"',
    lambda make: 'secret_name = "projects/shop/secrets/db"',
    lambda make: 'max_tokens = "4096"',
    lambda make: 'PASSWORD_FILE = "/run/secrets/db_password"',
    lambda make: f'token = "ghp_{make.token(29)}x{make.token(6)}"  # a wrong checksum',
    lambda make: f'integrity = "sha512-{make.chars(BASE64, 86)}=="',
    lambda make: 'label = {"password": "Password", "token": "Token"}',
    lambda make: 'csrf_token = "{{ csrf_token }}"',
    lambda make: 'tokenizer = "cl100k_base_tokenizer_v2"',
    lambda make: f'public_key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{make.token(43)}"',
)


def _lookalike(number: int) -> Build:
    def build(make: Maker) -> Case:
        line = _LOOKALIKE_LINES[number](make)
        return of("text", f"lookalikes/file{number}.py", f"import os\n{line}\n", label="look-alikes")

    return build


for _number in range(len(_LOOKALIKE_LINES)):
    case(_lookalike(_number))


@case
def _lookalike_yaml(make: Maker) -> Case:
    return of("text", "lookalikes/config.yaml", f"""password: ${{DB_PASSWORD}}
token: !vault secret/app
secretName: app-credentials
apiKeyRef: {{name: app, key: token}}
digest: sha256:{make.chars(HEX, 64)}
tokenUrl: https://idp.corp.test/oauth/token
auth: basic
""", label="look-alikes")  # fmt: skip


# --- of each format ---------------------------------------------------------------------------------------------------


def _format_of(value: str) -> Format:
    return next(one for one in FORMATS if one.marker in value and one.regex.fullmatch(value))


def _masked(value: str, fill: Callable[[int], str]) -> str:
    """The value with what follows its marker replaced, as documentation does. Punctuation stays."""
    marker = _format_of(value).marker
    start = value.index(marker) + len(marker)
    return value[:start] + "".join(
        fill(number) if char.isalnum() else char for number, char in enumerate(value[start:])
    )


def _forms(value: str) -> Iterator[tuple[str, str]]:
    """Yield names and values that look like a credential and are none."""
    yield "api_token", _masked(value, lambda number: "x")
    yield "api_token", _masked(value, lambda number: "X")
    yield "api_token", _masked(value, lambda number: "0")
    yield "api_token", _masked(value, lambda number: "1234567890"[number % 10])
    yield "api_token", _masked(value, lambda number: "abcdefghijklmnopqrstuvwxyz"[number % 26])
    form = _format_of(value)
    start = value.index(form.marker) + len(form.marker)
    yield "api_token", f"{value[: start + 1]}EXAMPLE{value[start + 8 :]}"
    yield "sample", value[: start + 8]
    yield "sample", f"z{value}"
    if form.check is not None:
        wrong = "A" if value[start + 3] != "A" else "Q"
        yield "api_token", value[: start + 3] + wrong + value[start + 4 :]


def _format_lookalike(label: str, make_value: Callable[[Maker], str]) -> Build:
    def build(make: Maker) -> Case:
        lines = [f'{name} = "{value}"' for name, value in _forms(make_value(make))]
        name = label.replace(" ", "-").lower()
        return of("text", f"lookalikes/{name}.py", "\n".join(lines) + "\n", label="look-alikes")

    return build


for _label, _, _make_value in FORMAT_CASES:
    case(_format_lookalike(_label, _make_value))


def _published(number: int) -> Build:
    """Credentials that vendors print in their documentation, or ship for tests: everybody has them."""

    def build(make: Maker) -> Case:
        name, value = PUBLISHED[number]
        return of("text", f"lookalikes/published{number}.env", f"{name}={value}\n", label="look-alikes")

    return build


PUBLISHED = (
    ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
    ("STRIPE_KEY", "sk_test_" "4eC39HqLyjWDarjtT1zdp7dc"),
    ("STRIPE_SECRET_KEY", "sk_test_" "BQokikJOvBiI2HlWgH4olfQ2"),
    ("RECAPTCHA_SECRET_KEY", "6LeIxAcTAAAAAGG-vFI1TnRWxMZNFuojJ4WifJWe"),
    ("STORAGE", "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey="
     "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==;"),
    ("COSMOS", "AccountEndpoint=https://localhost:8081/;AccountKey="
     "C2y6yDjf5/R+ob0N8A7Cgv30VRDJIWEHLM+4QDU5DE2nQ9nDuVTqobD4b8mGGyPMbIZnqyMsEcaGQy67XIw/Jw==;"),
    ("TELEGRAM_TOKEN", "110201543:AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw"),
    ("SLACK_TOKEN", "xoxb-" "17653672481-19874698323-pdFZKVeTuE8sk7oOcHrzqqgy"),
    ("GOOGLE_API_KEY", "AIza" "SyDaGmWKa4JsXZ-HjGw7ISLn_3namBGewQe"),
    ("GITHUB_TOKEN", "ghp_" "16C7e42F292c6912E7710c838347Ae178B4a"),
    ("JWT", "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIiwiaWF0IjoxNTE2"
     "MjM5MDIyfQ.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c"),
    ("CLIENT_SECRET", "d-FL95Q19q7MQmFpd7hHD0Ty"),
)  # fmt: skip
VAGRANT_LINE = "MIIEogIBAAKCAQEA6NF8iallvQVp22WDkTkyrtvp9eWW6A8YVr+kz4TjGYe7gHzI"
"""The begin of the key of Vagrant's boxes, which every installation has."""
for _number in range(len(PUBLISHED)):
    case(_published(_number))


# --- of each reader ---------------------------------------------------------------------------------------------------


def _lookalike_of(reader: str, path: str, text: Callable[[Maker], str | bytes]) -> None:
    """One file that the reader reads, with nothing to be found."""

    def build(make: Maker) -> Case:
        return of(reader, path, text(make), label="look-alikes")

    case(build)


def _mcp_lookalike(table: str) -> Callable[[Maker], str]:
    def text(make: Maker) -> str:
        return json.dumps({
            "numStartups": 12,
            "userID": make.chars(HEX, 64),
            "machineId": str(uuid.UUID(int=make.random.getrandbits(128), version=4)),
            table: {
                "github": {"command": "docker", "args": ["run", "-e", "GITHUB_PERSONAL_ACCESS_TOKEN", "ghcr.io/server"],
                           "env": {"GITHUB_PERSONAL_ACCESS_TOKEN": "<YOUR_TOKEN>", "GITHUB_TOKEN": "${env:GITHUB_TOKEN}"}},
                "search": {"command": "npx", "args": ["-y", "search@1.2.3", "--api-key", "YOUR_API_KEY"],
                           "env": {"API_KEY": "$SEARCH_API_KEY", "TOKEN_FILE": "/run/secrets/token"}},
                "remote": {"url": "https://mcp.corp.test/mcp", "headers": {"Authorization": "Bearer ${input:token}"}},
                "database": {"command": "npx", "args": ["postgres", "postgresql://user:password@localhost:5432/db"]},
                "wrong": {"command": "npx", "env": {"GITHUB_TOKEN": "ghp_xxxxxxxxxxxxxxxxxxxx", "OTHER": "op://vault/item/token"}},
            },
        }, indent=2)  # fmt: skip

    return text


for _reader, (_path, _table) in MCP_JSON.items():
    _lookalike_of(_reader, _path, _mcp_lookalike(_table))

_lookalike_of("mcp-codex", ".codex/config.toml", lambda make: f'''model = "gpt-5"
[mcp_servers.docs]
command = "npx"
args = ["-y", "docs-server", "--token", "$DOCS_TOKEN"]
[mcp_servers.docs.env]
DOCS_API_KEY = "your-api-key"
[mcp_servers.github]
bearer_token_env_var = "GITHUB_TOKEN"
[projects."/home/maria/{make.chars(HEX, 40)}"]
trust_level = "trusted"
''')  # fmt: skip
_lookalike_of("mcp-continue", ".continue/config.yaml", lambda make: """models:
  - name: Claude
    apiKey: ${{ secrets.ANTHROPIC_API_KEY }}
  - name: Local
    apiKey: <YOUR_API_KEY>
""")  # fmt: skip
_lookalike_of("mcp-goose", ".config/goose/config.yaml", lambda make: """OPENAI_API_KEY: your-api-key-here
extensions:
  jira:
    envs: {JIRA_API_TOKEN: "${JIRA_API_TOKEN}"}
    env_keys: [JIRA_API_TOKEN]
    bundled: null
""")  # fmt: skip
_lookalike_of(
    "mcp-aider", ".aider.conf.yml", lambda make: "openai-api-key: YOUR-KEY-GOES-HERE\nenv-file: .env\n"
)
_lookalike_of(
    "agent-login",
    ".codex/auth.json",
    lambda make: json.dumps(
        {
            "OPENAI_API_KEY": None,
            "tokens": None,
            "last_refresh": "2026-10-01T00:00:00Z",
            "account_id": make.chars(HEX, 32),
        }
    ),
)
_lookalike_of("aws-credentials", ".aws/credentials", lambda make: """[default]
aws_access_key_id = AKIAIOSFODNN7EXAMPLE
aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY
[sso]
sso_start_url = https://corp.awsapps.test/start
sso_account_id = 123456789012
credential_process = /usr/bin/helper --profile corp
[empty]
aws_secret_access_key = <YOUR_SECRET_ACCESS_KEY>
""")  # fmt: skip
_lookalike_of(
    "aws-cache",
    ".aws/sso/cache/botocore-client-id-eu-west-1.json",
    lambda make: json.dumps(
        {
            "clientId": make.chars(URL_SAFE, 22),
            "expiresAt": "2030-01-01T00:00:00Z",
            "startUrl": "https://corp.awsapps.test",
        }
    ),
)
_lookalike_of(
    "gcloud",
    ".config/gcloud/application_default_credentials.json",
    lambda make: json.dumps(
        {
            "type": "external_account",
            "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p",
            "credential_source": {"file": "/var/run/token"},
            "token_url": "https://sts.googleapis.com/v1/token",
        }
    ),
)
_lookalike_of(
    "gcp-service-account",
    "docs/key-example.json",
    lambda make: json.dumps(
        {
            "type": "service_account",
            "project_id": "PROJECT",
            "private_key_id": make.chars(HEX, 40),
            "private_key": "-----BEGIN PRIVATE KEY-----\n<your private key>\n-----END PRIVATE KEY-----\n",
            "client_email": "NAME@PROJECT.iam.gserviceaccount.com",
        }
    ),
)
_lookalike_of(
    "azure",
    ".azure/msal_token_cache.json",
    lambda make: json.dumps(
        {
            "AccessToken": {},
            "RefreshToken": {},
            "Account": {"x": {"home_account_id": make.chars(HEX, 36), "username": "m"}},
        }
    ),
)
_lookalike_of("kubeconfig", ".kube/config", lambda make: f"""apiVersion: v1
kind: Config
clusters:
- name: prod
  cluster: {{server: "https://prod.k8s.test", certificate-authority-data: {make.chars(BASE64, 200)}}}
contexts: [{{name: prod, context: {{cluster: prod, user: maria}}}}]
users:
- name: maria
  user:
    exec: {{command: aws, args: [eks, get-token, --cluster-name, prod], env: [{{name: AWS_PROFILE, value: prod}}]}}
- name: placeholder
  user: {{token: "<your-token-here>"}}
""")  # fmt: skip
_lookalike_of(
    "service-account", "var/run/secrets/kubernetes.io/serviceaccount/token", lambda make: "changeme\n"
)
_lookalike_of("mounted-secret", "run/secrets/api_key", lambda make: "${API_KEY}\n")
_lookalike_of(
    "docker",
    ".docker/config.json",
    lambda make: json.dumps(
        {
            "auths": {
                "registry.corp.test": {},
                "https://index.docker.io/v1/": {"auth": base64.b64encode(b"user:password").decode()},
            },
            "credsStore": "secretservice",
            "credHelpers": {"eu.gcr.io": "gcloud"},
        }
    ),
)
_lookalike_of(
    "github-cli",
    ".config/gh/hosts.yml",
    lambda make: "github.com:\n    users:\n        maria:\n    user: maria\n",
)
_lookalike_of("gitlab-cli", ".config/glab-cli/config.yml", lambda make: """hosts:
    gitlab.com:
        token: <your-access-token>
        api_host: gitlab.com
""")  # fmt: skip
_lookalike_of(
    "git-credentials",
    ".git-credentials",
    lambda make: (
        "https://maria@github.com\nhttps://user:password@example.com\nhttps://maria:${TOKEN}@git.corp.test\n"
    ),
)
_lookalike_of("git-config", "repository/.git/config", lambda make: f"""[remote "origin"]
\turl = git@github.com:corp/shop.git
\turl = https://maria@github.com/corp/shop.git
[credential]
\thelper = store --file ~/.git-credentials
[user]
\tsigningkey = {make.chars(HEX, 40).upper()}
[branch "{make.chars(HEX, 40)}"]
\tremote = origin
""")  # fmt: skip
_lookalike_of(
    "netrc", ".netrc", lambda make: "machine api.corp.test login maria password <password>\n# password old\n"
)
_lookalike_of(
    "pgpass", ".pgpass", lambda make: "# host:port:database:user:password\nlocalhost:5432:*:app:changeme\n"
)
_lookalike_of(
    "mysql", ".my.cnf", lambda make: "[client]\nuser=app\npassword=your_password\nprompt=\\u@\\h> \n"
)
_lookalike_of("npm", ".npmrc", lambda make: f"""//registry.npmjs.org/:_authToken=${{NPM_TOKEN}}
//old.corp.test/:_authToken=<token>
//bad.corp.test/:_authToken=your-token-here
cache-hash={make.chars(HEX, 40)}
always-auth=true
""")  # fmt: skip
_lookalike_of("pypi", ".pypirc", lambda make: "[pypi]\nusername = __token__\npassword = <your-token>\n")
_lookalike_of("cargo", ".cargo/config.toml", lambda make: f"""[registry]
token = "${{CARGO_TOKEN}}"
[env]
GIT_HASH = "{make.chars(HEX, 40)}"
[registries.corp]
credential-provider = ["cargo:token-from-stdout", "vault", "read"]
""")  # fmt: skip
_lookalike_of("maven", ".m2/settings.xml", lambda make: f"""<settings><servers>
<server><id>a</id><username>m</username><password>${{env.MAVEN_PASSWORD}}</password></server>
<server><id>b</id><username>m</username><password>{{{make.chars(BASE64, 40)}=}}</password></server>
</servers></settings>
""")  # fmt: skip
_lookalike_of("gradle", ".gradle/gradle.properties", lambda make: f"""corpPassword=${{CORP_PASSWORD}}
kotlin.version=2.1.0
distributionSha256Sum={make.chars(HEX, 64)}
passwordMinLength=12
""")  # fmt: skip
_lookalike_of("terraform", "infra/prod.tfvars", lambda make: f"""db_password = "CHANGE_ME"
image_digest = "sha256:{make.chars(HEX, 64)}"
secret_arn = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:db-{make.token(6)}"
token_ttl = "3600"
""")  # fmt: skip
_lookalike_of("vault", ".vault-token", lambda make: "${VAULT_TOKEN}\n")
_lookalike_of(
    "ssh-key",
    ".ssh/id_rsa",
    lambda make: (
        f"-----BEGIN RSA PRIVATE KEY-----\n{VAGRANT_LINE}\n"
        + "\n".join(make.chars(BASE64, 64) for _ in range(20))
        + "\n-----END RSA PRIVATE KEY-----\n"
    ),
)
_lookalike_of("dotenv", "lookalikes/.env.example", lambda make: f"""API_KEY=your-api-key
DB_PASSWORD=changeme
TOKEN=<token>
SECRET=
GITHUB_TOKEN=ghp_{"x" * 36}
NPM_TOKEN=npm_1234567890abcdefghijklmnopqrstuvwxyz
GH_TOKEN=ghp_your_token_here
AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY
AUTH_MODE=password
PASSWORD_MIN_LENGTH=12
SENTRY_RELEASE={make.chars(HEX, 40)}
DATABASE_URL=postgres://user:password@localhost:5432/app
REDIS_URL=redis://:${{REDIS_PASSWORD}}@cache:6379
""")  # fmt: skip
_lookalike_of("shell", ".bashrc", lambda make: f"""export API_KEY="$(pass show api)"
export GITHUB_TOKEN=$(gh auth token)
export PASSWORD_STORE_DIR=$HOME/.password-store
read -s -p "Password: " PASSWORD
curl -u "$USER:$PASSWORD" https://api.corp.test
git show {make.chars(HEX, 40)}
export TOKEN=<token>
""")  # fmt: skip
_lookalike_of("ci", "repository/.github/workflows/test.yml", lambda make: f"""on: push
jobs:
  test:
    runs-on: ubuntu-latest
    permissions: {{id-token: write, contents: read}}
    services:
      db: {{image: postgres, env: {{POSTGRES_PASSWORD: postgres}}}}
    steps:
      - uses: actions/checkout@{make.chars(HEX, 40)}
      - run: ./deploy --token ${{{{ secrets.DEPLOY_TOKEN }}}}
        env:
          NPM_TOKEN: ${{{{ secrets.NPM_TOKEN }}}}
          DIGEST: sha256:{make.chars(HEX, 64)}
""")  # fmt: skip
_lookalike_of("compose", "app/compose.yaml", lambda make: f"""services:
  db:
    image: postgres@sha256:{make.chars(HEX, 64)}
    environment:
      POSTGRES_PASSWORD_FILE: /run/secrets/db_password
      POSTGRES_PASSWORD: ${{DB_PASSWORD:?set it}}
    secrets: [db_password]
secrets:
  db_password: {{file: ./db_password.txt}}
""")  # fmt: skip
_lookalike_of("kubernetes", "deploy/lookalike.yaml", lambda make: f"""apiVersion: v1
kind: Secret
metadata: {{name: db, uid: {uuid.UUID(int=make.random.getrandbits(128), version=4)}}}
stringData:
  password: ${{DB_PASSWORD}}
  username: app
---
apiVersion: bitnami.com/v1alpha1
kind: SealedSecret
metadata: {{name: sealed}}
spec: {{encryptedData: {{password: {make.chars(BASE64, 400)}}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: web, annotations: {{checksum/config: {make.chars(HEX, 64)}}}}}
spec:
  containers:
  - name: web
    image: web@sha256:{make.chars(HEX, 64)}
    env:
    - {{name: API_KEY, valueFrom: {{secretKeyRef: {{name: db, key: api-key}}}}}}
    - {{name: TOKEN_PATH, value: /var/run/token}}
""")  # fmt: skip
_lookalike_of("helm-values", "chart/values.yaml", lambda make: f"""image: {{digest: "sha256:{make.chars(HEX, 64)}"}}
auth:
  existingSecret: db-credentials
  secretKeys: {{adminPasswordKey: postgres-password}}
  password: ""
  token: "{{{{ .Values.global.token }}}}"
""")  # fmt: skip
_lookalike_of("systemd", "etc/systemd/system/web.service", lambda make: """[Service]
Environment="API_KEY=%d/api_key" TOKEN=${TOKEN}
LoadCredentialEncrypted=api_key:/etc/credstore/api_key
ExecStart=/usr/bin/web --token-file %d/api_key --password $PASSWORD
""")  # fmt: skip
_lookalike_of("crontab", "etc/cron.d/report", lambda make: """MAILTO=root
PASSWORD=${PASSWORD}
0 3 * * * root /usr/bin/report --token "$(cat /run/token)" --password-file /etc/report.pass
""")  # fmt: skip

_LOCK_LINES: tuple[tuple[str, Callable[[Maker], str]], ...] = (
    ("package-lock.json", lambda make: json.dumps({"packages": {"node_modules/token-types": {
        "version": "6.0.0", "resolved": "https://registry.npmjs.org/token-types/-/token-types-6.0.0.tgz",
        "integrity": f"sha512-{make.chars(BASE64, 86)}=="}}}, indent=2)),
    ("yarn.lock", lambda make: f'secret@1.0.0:\n  resolved "https://r.test/s.tgz#{make.chars(HEX, 40)}"\n'
     f"  integrity sha512-{make.chars(BASE64, 86)}==\n"),
    ("pnpm-lock.yaml", lambda make: "packages:\n  /token-types@6.0.0:\n"
     f"    resolution: {{integrity: sha512-{make.chars(BASE64, 86)}==}}\n"),
    ("Cargo.lock", lambda make: f'[[package]]\nname = "secret"\nversion = "1.0.0"\nchecksum = "{make.chars(HEX, 64)}"\n'),
    ("poetry.lock", lambda make: f'[[package]]\nname = "token"\nfiles = [{{file = "t.whl", hash = "sha256:{make.chars(HEX, 64)}"}}]\n'),
    ("uv.lock", lambda make: f'[[package]]\nname = "password"\nsdist = {{ hash = "sha256:{make.chars(HEX, 64)}" }}\n'),
    ("go.sum", lambda make: f"github.com/corp/token v1.2.3 h1:{make.chars(BASE64, 43)}=\n"),
    ("flake.lock", lambda make: json.dumps({"nodes": {"secrets": {"locked": {
        "narHash": f"sha256-{make.chars(BASE64, 43)}=", "rev": make.chars(HEX, 40)}}}})),
    (".terraform.lock.hcl", lambda make: f'provider "r.test/hashicorp/vault" {{\n  hashes = ["h1:{make.chars(BASE64, 43)}=", '
     f'"zh:{make.chars(HEX, 64)}"]\n}}\n'),
)  # fmt: skip
for _name, _lock in _LOCK_LINES:
    _lookalike_of("text", f"lookalikes/{_name}", _lock)
_lookalike_of("keyring", ".local/share/keyrings/plain.keyring", lambda make: """[keyring]
display-name=plain

[1]
display-name=empty
secret=
mtime=1789000000

[2]
secret=<password>
""")  # fmt: skip
