"""Planted cases: a file for each reader, as the tools write it."""

from __future__ import annotations

import base64
import json
import sqlite3

from tests.support.scan_corpus.maker import (
    ALNUM,
    BASE64,
    HEX,
    OTHER,
    URL_SAFE,
    A,
    Build,
    Case,
    Maker,
    P,
    S,
    U,
    case,
    of,
    pem_body,
)

# --- agents and MCP clients -------------------------------------------------------------------------------------------

MCP_JSON = {
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
    "mcp-antigravity": (".gemini/config/mcp_config.json", "mcpServers"),
    "mcp-kilo-code": (".config/kilo/kilo.jsonc", "mcp"),
    "mcp-droid": (".factory/mcp.json", "mcpServers"),
    "mcp-gitlab-duo": (".gitlab/duo/mcp.json", "mcpServers"),
    "mcp-openclaw": (".openclaw/openclaw.json", "mcpServers"),
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
        return of(reader, path, text, (github, S), (key, S), (bearer, S), (password, P), label="mcp clients")

    return build


for _reader, (_path, _table) in MCP_JSON.items():
    case(_mcp_case(_reader, _path, _table))


@case
def _codex(make: Maker) -> Case:
    key, github = make.token(40), make.crc_token("ghp")
    return of("mcp-codex", ".codex/config.toml", f'''model = "gpt-5"
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
    key = f"sk-ant-api03-{make.chars(URL_SAFE, 93)}AA"
    return of("mcp-continue", ".continue/config.yaml", f"""name: Local
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
    return of("mcp-goose", ".config/goose/config.yaml", f"""GOOSE_PROVIDER: openai
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
    return of(
        "mcp-aider",
        ".aider.conf.yml",
        f"model: sonnet\nopenai-api-key: {key}\n",
        (key, S),
        label="mcp clients",
    )


@case
def _claude_login(make: Maker) -> Case:
    access = f"sk-ant-oat01-{make.chars(URL_SAFE, 93)}AA"
    refresh = f"sk-ant-ort01-{make.chars(URL_SAFE, 93)}AA"
    document = {"claudeAiOauth": {"accessToken": access, "refreshToken": refresh, "expiresAt": 1999999999000,
                                  "scopes": ["user:inference"], "subscriptionType": "max"}}  # fmt: skip
    return of("agent-login", ".claude/.credentials.json", json.dumps(document), (access, U), (refresh, U))


@case
def _codex_login(make: Maker) -> Case:
    token, refresh = make.jwt(), make.chars(URL_SAFE, 60)
    document = {
        "OPENAI_API_KEY": None,
        "tokens": {"id_token": token, "refresh_token": refresh, "account_id": "5b1f"},
    }
    return of("agent-login", ".codex/auth.json", json.dumps(document, indent=2), (token, U), (refresh, U))


@case
def _copilot_login(make: Maker) -> Case:
    token = make.crc_token("ghu")
    document = {
        "github.com:Iv1.b507a08c87ecfe98": {"user": "maria", "oauth_token": token, "githubAppId": "Iv1.b5"}
    }
    return of("agent-login", ".config/github-copilot/apps.json", json.dumps(document), (token, U))


# --- clouds -----------------------------------------------------------------------------------------------------------


@case
def _aws(make: Maker) -> Case:
    secret, session_secret, session = make.aws_secret(), make.aws_secret(), make.chars(BASE64, 356)
    text = f"""[default]
aws_access_key_id = {make.aws_id()}
aws_secret_access_key = {secret}

[admin]
aws_access_key_id={make.aws_id("ASIA")}
aws_secret_access_key={session_secret}
aws_session_token={session}
"""
    ids = [line.rpartition("=")[2].strip() for line in text.splitlines() if "key_id" in line]
    return of("aws-credentials", ".aws/credentials", text, (secret, S), (session_secret, U), (session, U), (ids[0], S),
               (ids[1], U))  # fmt: skip


@case
def _aws_sso(make: Maker) -> Case:
    token, refresh, secret = make.chars(URL_SAFE, 300), make.chars(URL_SAFE, 300), make.jwt()
    document = {"startUrl": "https://corp.awsapps.test/start", "region": "eu-west-1", "accessToken": token,
                "expiresAt": "2030-01-01T00:00:00Z", "refreshToken": refresh, "clientSecret": secret}  # fmt: skip
    return of(
        "aws-cache",
        ".aws/sso/cache/corp.json",
        json.dumps(document),
        (token, U),
        (refresh, U),
        (secret, U),
    )


@case
def _gcloud(make: Maker) -> Case:
    refresh = f"1//0{make.chars(URL_SAFE, 90)}"
    document = {"client_id": "764086051850-6qr4p6gpi6hn506pt8ejuq83di341hur.apps.googleusercontent.com",
                "client_secret": "d-FL95Q19q7MQmFpd7hHD0Ty", "quota_project_id": "shop", "refresh_token": refresh,
                "type": "authorized_user"}  # fmt: skip
    return of(
        "gcloud", ".config/gcloud/application_default_credentials.json", json.dumps(document), (refresh, U)
    )


@case
def _gcloud_database(make: Maker) -> Case:
    refresh = f"1//0{make.chars(URL_SAFE, 90)}"
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE credentials (account_id TEXT PRIMARY KEY, value BLOB)")
    value = json.dumps({"client_id": "3.apps", "refresh_token": refresh, "type": "authorized_user"})
    connection.execute("INSERT INTO credentials VALUES (?, ?)", ("maria@corp.test", value))
    connection.commit()
    return of("gcloud", ".config/gcloud/credentials.db", connection.serialize(), (refresh, U))


@case
def _gcp_service_account(make: Maker) -> Case:
    pem = make.pem()
    document = {"type": "service_account", "project_id": "shop", "private_key_id": make.chars(HEX, 40),
                "private_key": pem, "client_email": "deploy@shop.iam.gserviceaccount.com",
                "token_uri": "https://oauth2.googleapis.com/token"}  # fmt: skip
    return of("gcp-service-account", "keys/shop-4f1.json", json.dumps(document, indent=2), (pem_body(pem), A))


@case
def _azure(make: Maker) -> Case:
    access, refresh = make.jwt(scp="user_impersonation"), f"0.A{make.chars(URL_SAFE, 400)}"
    document = {
        "AccessToken": {"a": {"secret": access, "home_account_id": "1.2", "realm": "t", "target": "https://management"}},
        "RefreshToken": {"r": {"secret": refresh, "home_account_id": "1.2"}},
        "Account": {"x": {"home_account_id": "1.2", "username": "maria@corp.test"}},
    }  # fmt: skip
    return of("azure", ".azure/msal_token_cache.json", json.dumps(document), (access, U), (refresh, U))


@case
def _azure_principal(make: Maker) -> Case:
    secret = make.chars(ALNUM + "~._", 40)
    document = [{"client_id": "8d3c", "tenant": "t-1", "client_secret": secret}]
    return of("azure", ".azure/service_principal_entries.json", json.dumps(document), (secret, A))


@case
def _kubeconfig(make: Maker) -> Case:
    account = make.jwt(sub="system:serviceaccount:ci:deployer", iss="kubernetes/serviceaccount")
    pem = make.pem()
    data = base64.b64encode(pem.encode()).decode()
    return of("kubeconfig", ".kube/config", f"""apiVersion: v1
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
    return of("service-account", "var/run/secrets/kubernetes.io/serviceaccount/token", token, (token, A))


@case
def _mounted_secret(make: Maker) -> Case:
    value = make.token(32)
    return of("mounted-secret", "run/secrets/api_key", value + "\n", (value, S))


# --- containers, forges, databases ------------------------------------------------------------------------------------


@case
def _docker(make: Maker) -> Case:
    password, identity = make.password(), make.token(60)
    auth = base64.b64encode(f"maria:{password}".encode()).decode()
    document = {"auths": {"registry.corp.test": {"auth": auth}, "corp.azurecr.io": {"identitytoken": identity}},
                "credsStore": "desktop"}  # fmt: skip
    return of("docker", ".docker/config.json", json.dumps(document, indent=1), (password, P), (identity, U))


@case
def _gh(make: Maker) -> Case:
    token = make.crc_token("gho")
    return of("github-cli", ".config/gh/hosts.yml", f"""github.com:
    git_protocol: https
    users:
        maria:
            oauth_token: {token}
    oauth_token: {token}
    user: maria
""", (token, U))  # fmt: skip


@case
def _glab(make: Maker) -> Case:
    token = f"glpat-{make.chars(URL_SAFE, 20)}"
    return of("gitlab-cli", ".config/glab-cli/config.yml", f"""git_protocol: ssh
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
    return of("git-credentials", ".git-credentials", text, (token, S), (password, P))


@case
def _git_config(make: Maker) -> Case:
    token, header = f"glpat-{make.chars(URL_SAFE, 20)}", make.token(30)
    basic = base64.b64encode(f"x:{header}".encode()).decode()
    return of("git-config", "repository/.git/config", f"""[core]
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
    return of("netrc", ".netrc", f"machine api.corp.test login maria password {password}\nmachine git.corp.test\n"
               f"  login bot\n  password {other}\n", (password, P), (other, P))  # fmt: skip


@case
def _pgpass(make: Maker) -> Case:
    password = make.token(16)
    return of("pgpass", ".pgpass", f"# hosts\ndb.corp.test:5432:shop:app:{password}\n", (password, P))


@case
def _mysql(make: Maker) -> Case:
    password = make.token(16)
    return of(
        "mysql", ".my.cnf", f'[client]\nuser=app\nhost=db.corp.test\npassword="{password}"\n', (password, P)
    )


@case
def _npm(make: Maker) -> Case:
    token, other, password = make.crc_token("npm"), make.token(44), make.token(20)
    encoded = base64.b64encode(password.encode()).decode()
    return of("npm", ".npmrc", f"""//registry.npmjs.org/:_authToken={token}
//npm.corp.test/:_authToken={other}
//old.corp.test/:username=maria
//old.corp.test/:_password={encoded}
//ci.corp.test/:_authToken=${{NPM_TOKEN}}
""", (token, S), (other, S), (password, P))  # fmt: skip


@case
def _pypirc(make: Maker) -> Case:
    token, password = make.pypi_token(), make.token(20)
    return of("pypi", ".pypirc", f"""[distutils]
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
    return of("pypi", ".config/pip/pip.conf", f"[global]\nindex-url = https://maria:{password}@pypi.corp.test/simple\n",
               (password, P))  # fmt: skip


@case
def _cargo(make: Maker) -> Case:
    token, other = f"cio{make.token(32)}", make.token(40)
    return of("cargo", ".cargo/credentials.toml", f'[registry]\ntoken = "{token}"\n'
               f'[registries.corp]\ntoken = "{other}"\n',
               (token, S), (other, S))  # fmt: skip


@case
def _maven(make: Maker) -> Case:
    password = make.token(20)
    return of("maven", ".m2/settings.xml", f"""<settings xmlns="http://maven.apache.org/SETTINGS/1.0.0"><servers>
<server><id>corp</id><username>maria</username><password>{password}</password></server>
<server><id>other</id><username>m</username><password>{{COQLCE6DU6GtcS5P=}}</password></server>
</servers></settings>
""", (password, P))  # fmt: skip


@case
def _gradle(make: Maker) -> Case:
    password = make.token(20)
    return of(
        "gradle",
        ".gradle/gradle.properties",
        f"org.gradle.daemon=true\ncorpPassword={password}\n",
        (password, P),
    )


@case
def _terraform(make: Maker) -> Case:
    token = f"{make.token(14)}.atlasv1.{make.token(67)}"
    document = {"credentials": {"app.terraform.io": {"token": token}}}
    return of("terraform", ".terraform.d/credentials.tfrc.json", json.dumps(document), (token, S))


@case
def _tfstate(make: Maker) -> Case:
    password = make.token(24)
    document = {"version": 4, "resources": [{"type": "aws_db_instance", "name": "shop", "instances": [
        {"attributes": {"username": "app", "password": password, "port": 5432}}]}]}  # fmt: skip
    return of("terraform", "infra/terraform.tfstate", json.dumps(document, indent=2), (password, P))


@case
def _tfvars(make: Maker) -> Case:
    password = make.token(24)
    return of(
        "terraform", "infra/prod.tfvars", f'region = "eu-west-1"\ndb_password = "{password}"\n', (password, P)
    )


@case
def _vault(make: Maker) -> Case:
    token = f"hvs.{make.chars(URL_SAFE, 90)}"
    return of("vault", ".vault-token", token, (token, U))


@case
def _ssh(make: Maker) -> Case:
    key = make.ssh_key()
    return of("ssh-key", ".ssh/id_ed25519", key, (pem_body(key), S))


@case
def _ssh_locked(make: Maker) -> Case:
    key = make.locked_ssh_key()
    return of("ssh-key", ".ssh/id_locked", key, (pem_body(key), OTHER))


# --- what machines run ------------------------------------------------------------------------------------------------


@case
def _dotenv(make: Maker) -> Case:
    stripe, password, secret = f"sk_live_{make.token(24)}", make.password(), make.token(48)
    return of("dotenv", "app/.env", f"""# settings
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
    return of("shell", ".bashrc", f"""alias ll='ls -l'
export CORP_API_KEY="{key}"
curl -u maria:{password} https://api.corp.test/v1
export PATH=$HOME/bin:$PATH
""", (key, S), (password, P))  # fmt: skip


@case
def _ci(make: Maker) -> Case:
    token, key = make.crc_token("ghp"), make.token(40)
    return of("ci", "repository/.github/workflows/release.yml", f"""on: push
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
    return of("ci", "repository/.gitlab-ci.yml", f"""variables:
  REGISTRY_PASSWORD: {password}
build:
  script:
    - docker login -u ci -p $REGISTRY_PASSWORD registry.corp.test
""", (password, P))  # fmt: skip


@case
def _compose(make: Maker) -> Case:
    password, key = make.token(20), make.token(40)
    return of("compose", "app/docker-compose.yml", f"""services:
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
    return of("kubernetes", "deploy/app.yaml", f"""apiVersion: v1
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
    return of("helm-values", "chart/values.yaml", f"""image: {{tag: 1.2.3}}
postgresql:
  auth:
    username: app
    password: {password}
    existingSecret: db-credentials
""", (password, P))  # fmt: skip


@case
def _systemd(make: Maker) -> Case:
    key, token = make.token(40), make.token(30)
    return of("systemd", "etc/systemd/system/agent.service", f"""[Unit]
Description=agent
[Service]
Environment="AGENT_API_KEY={key}" LOG=debug
EnvironmentFile=/etc/agent/env
ExecStart=/usr/bin/agent --token {token} --port 8080
""", (key, S), (token, S))  # fmt: skip


@case
def _crontab(make: Maker) -> Case:
    password, token = make.token(20), make.token(32)
    return of("crontab", "etc/cron.d/backup", f"""SHELL=/bin/sh
BACKUP_PASSWORD={password}
0 3 * * * root curl -H 'X-Api-Key: {token}' https://backup.corp.test/run
""", (password, P), (token, S))  # fmt: skip


# --- other forms that the same readers know ---------------------------------------------------------------------------


@case
def _aws_cli_cache(make: Maker) -> Case:
    secret, session = make.aws_secret(), make.chars(BASE64, 300)
    document = {"Credentials": {"AccessKeyId": make.aws_id("ASIA"), "SecretAccessKey": secret, "SessionToken": session,
                                "Expiration": "2030-01-01T00:00:00UTC"},
                "AssumedRoleUser": {"Arn": "arn:aws:sts::123456789012:assumed-role/deploy/maria"}}  # fmt: skip
    return of("aws-cache", ".aws/cli/cache/role.json", json.dumps(document), (secret, U), (session, U),
              (document["Credentials"]["AccessKeyId"], U))  # fmt: skip


@case
def _gcloud_access_tokens(make: Maker) -> Case:
    token = f"ya29.{make.chars(URL_SAFE, 180)}"
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE access_tokens (account_id TEXT PRIMARY KEY, access_token TEXT)")
    connection.execute("INSERT INTO access_tokens VALUES (?, ?)", ("maria@corp.test", token))
    connection.commit()
    return of("gcloud", ".config/gcloud/access_tokens.db", connection.serialize(), (token, U))


@case
def _azure_older_tokens(make: Maker) -> Case:
    access, refresh = make.jwt(), f"0.A{make.chars(URL_SAFE, 300)}"
    document = [{"accessToken": access, "refreshToken": refresh, "userId": "maria@corp.test", "tenantId": "t-1",
                 "resource": "https://management.core.windows.net/"}]  # fmt: skip
    return of("azure", ".azure/accessTokens.json", json.dumps(document), (access, U), (refresh, U))


@case
def _kubeconfig_password(make: Maker) -> Case:
    password, token = make.token(20), make.token(64)
    return of("kubeconfig", "deploy/kubeconfig", f"""apiVersion: v1
kind: Config
clusters: [{{name: old, cluster: {{server: "https://10.0.0.1:6443"}}}}]
contexts: [{{name: old, context: {{cluster: old, user: admin}}}}]
users:
- name: admin
  user: {{username: admin, password: {password}}}
- name: oidc
  user:
    auth-provider: {{name: oidc, config: {{refresh-token: {token}, idp-issuer-url: https://idp.test}}}}
""", (password, P), (token, U))  # fmt: skip


@case
def _podman(make: Maker) -> Case:
    password = make.password()
    auth = base64.b64encode(f"bot:{password}".encode()).decode()
    return of(
        "docker",
        ".config/containers/auth.json",
        json.dumps({"auths": {"quay.io": {"auth": auth}}}),
        (password, P),
    )


@case
def _dockercfg(make: Maker) -> Case:
    password = make.password()
    return of("docker", ".dockercfg", json.dumps({"https://index.docker.io/v1/": {"username": "m", "password": password}}),
              (password, P))  # fmt: skip


@case
def _git_global(make: Maker) -> Case:
    token = make.crc_token("ghp")
    return of("git-config", ".gitconfig", f"""[url "https://maria:{token}@github.com/"]
\tinsteadOf = https://github.com/
""", (token, S))  # fmt: skip


@case
def _yarnrc(make: Maker) -> Case:
    token = make.token(44)
    return of("npm", ".yarnrc.yml", f"""npmScopes:
  corp:
    npmRegistryServer: https://npm.corp.test
    npmAuthToken: {token}
""", (token, S))  # fmt: skip


@case
def _poetry(make: Maker) -> Case:
    password, token = make.token(20), make.pypi_token()
    return of("pypi", ".config/pypoetry/auth.toml", f"""[http-basic.corp]
username = "maria"
password = "{password}"
[pypi-token]
pypi = "{token}"
""", (password, P), (token, S))  # fmt: skip


@case
def _terraformrc(make: Maker) -> Case:
    token = f"{make.token(14)}.atlasv1.{make.token(67)}"
    return of(
        "terraform",
        ".terraformrc",
        f'credentials "app.terraform.io" {{\n  token = "{token}"\n}}\n',
        (token, S),
    )


@case
def _mylogin(make: Maker) -> Case:
    return of("mysql", ".mylogin.cnf", b"\0\0\0\0" + make.random.randbytes(120), unread=(P,))


@case
def _putty(make: Maker) -> Case:
    body = [make.chars(BASE64, 64), make.chars(BASE64, 40)]
    return of("ssh-key", "keys/server.ppk", f"""PuTTY-User-Key-File-3: ssh-ed25519
Encryption: none
Comment: maria
Public-Lines: 2
{make.chars(BASE64, 64)}
{make.chars(BASE64, 20)}
Private-Lines: 2
{body[0]}
{body[1]}
Private-MAC: {make.chars(HEX, 64)}
""", ("".join(body), S))  # fmt: skip


@case
def _ssh_older(make: Maker) -> Case:
    """An encrypted key in the form before OpenSSH 7.8."""
    body = [make.chars(BASE64, 64) for _ in range(8)]
    return of("ssh-key", ".ssh/id_rsa", "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n"
              f"DEK-Info: AES-128-CBC,{make.chars(HEX, 32).upper()}\n\n" + "\n".join(body)
              + "\n-----END RSA PRIVATE KEY-----\n", ("".join(body), OTHER))  # fmt: skip


@case
def _fish_history(make: Maker) -> Case:
    password = make.token(18)
    return of("shell", ".local/share/fish/fish_history",
              f"- cmd: curl -u maria:{password} https://api.corp.test\n  when: 1\n", (password, P))  # fmt: skip


@case
def _jenkinsfile(make: Maker) -> Case:
    token = f"glpat-{make.chars(URL_SAFE, 20)}"
    return of("ci", "repository/Jenkinsfile", f"""pipeline {{ stages {{ stage('a') {{ steps {{
  sh 'curl --header "PRIVATE-TOKEN: {token}" https://gitlab.com/api/v4/projects'
}} }} }} }}
""", (token, S))  # fmt: skip


@case
def _kubernetes_pull_secret(make: Maker) -> Case:
    password = make.password()
    auth = base64.b64encode(f"bot:{password}".encode()).decode()
    inner = base64.b64encode(json.dumps({"auths": {"registry.corp.test": {"auth": auth}}}).encode()).decode()
    return of("kubernetes", "deploy/pull.json", json.dumps({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "pull"}, "type": "kubernetes.io/dockerconfigjson",
        "data": {".dockerconfigjson": inner}}), (password, P))  # fmt: skip


@case
def _cline_providers(make: Maker) -> Case:
    key = make.token(48)
    document = {"version": 1, "providers": {"openai": {"settings": {"provider": "openai", "apiKey": key}}}}
    return of(
        "mcp-cline",
        ".cline/data/settings/providers.json",
        json.dumps(document),
        (key, S),
        label="mcp clients",
    )


@case
def _cursor_login(make: Maker) -> Case:
    access, refresh = make.jwt(), make.jwt(typ="refresh")
    return of("agent-login", ".config/cursor/auth.json", json.dumps({"accessToken": access, "refreshToken": refresh}),
              (access, U), (refresh, U))  # fmt: skip


@case
def _gemini_mcp_tokens(make: Maker) -> Case:
    access, refresh = make.token(64), make.token(64)
    document = [{"serverName": "tickets", "token": {"accessToken": access, "refreshToken": refresh,
                 "expiresAt": 1999999999000, "tokenType": "Bearer"}, "clientId": make.token(20)}]  # fmt: skip
    return of("agent-login", ".gemini/mcp-oauth-tokens.json", json.dumps(document), (access, U), (refresh, U))


@case
def _keyring(make: Maker) -> Case:
    content = b"GnomeKeyring\n\r\0\n\0\0\0" + make.random.randbytes(300)
    return of("keyring", ".local/share/keyrings/login.keyring", content, unread=(U,))


@case
def _keyring_without_password(make: Maker) -> Case:
    token = make.crc_token("gho")
    return of("keyring", ".local/share/keyrings/plain.keyring", f"""[keyring]
display-name=plain
lock-on-idle=false

[1]
item-type=0
display-name=gh:github.com
secret={token}
mtime=1789000000
""", (token, U))  # fmt: skip


@case
def _gnupg(make: Maker) -> Case:
    name = make.chars(BASE64, 8).encode().hex().upper()
    return of("keyring", f".gnupg/private-keys-v1.d/{name}.key", b"(21:protected-private-key" + make.random.randbytes(400),
              unread=(OTHER,))  # fmt: skip
