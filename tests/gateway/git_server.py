"""A real Git server: `git http-backend` behind nginx, which lets in those with the target's secret alone."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ringfence.dev.processes import LOOPBACK, free_port, spawn

USER, SECRET = "x-access-token", "canary-of-the-git-server"
PROGRAMS = ("git", "nginx", "fcgiwrap")
_START_S = 30.0
_NGINX = """\
worker_processes 1; master_process off; daemon off; pid {folder}/nginx.pid; error_log stderr;
events {{ }}
http {{
  log_format seen '$request_method $uri?$args protocol="$http_git_protocol" coding="$http_content_encoding" $status';
  access_log {folder}/requests.log seen;
  client_body_temp_path {folder}/temp; fastcgi_temp_path {folder}/temp; proxy_temp_path {folder}/temp;
  uwsgi_temp_path {folder}/temp; scgi_temp_path {folder}/temp;
  client_max_body_size 0; fastcgi_buffering off;
  server {{
    listen {host}:{port};
    if ($http_authorization != "{authorization}") {{ return 401; }}
    location / {{
      fastcgi_pass unix:{folder}/cgi.sock;
      fastcgi_param SCRIPT_FILENAME {backend};
      fastcgi_param PATH_INFO $uri;
      fastcgi_param GIT_PROJECT_ROOT {folder}/repositories;
      fastcgi_param GIT_HTTP_EXPORT_ALL 1;
      fastcgi_param GIT_CONFIG_NOSYSTEM 1;
      fastcgi_param QUERY_STRING $query_string;
      fastcgi_param REQUEST_METHOD $request_method;
      fastcgi_param CONTENT_TYPE $content_type;
      fastcgi_param CONTENT_LENGTH $content_length;
      fastcgi_param REMOTE_USER agent;
      fastcgi_param REMOTE_ADDR $remote_addr;
    }}
  }}
}}
"""


def git(folder: Path, *argv: str, check: bool = True) -> str:
    """Run git without any configuration of this machine. Returns what it prints."""
    done = subprocess.run(
        ["git", *argv], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout.strip()


def environment() -> dict[str, str]:
    who = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return {
        "PATH": os.environ["PATH"], "HOME": os.devnull, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", **who,
    }  # fmt: skip


@dataclass
class GitServer:
    """The server, with bare repositories under `repositories`."""

    folder: Path
    port: int

    def repository(self, name: str, *, commits: int = 2) -> Path:
        """Make a repository with commits on `main`."""
        bare = self.folder / "repositories" / name
        git(self.folder, "init", "-q", "--bare", "-b", "main", str(bare))
        for key in (
            "uploadpack.allowFilter",
            "uploadpack.allowAnySHA1InWant",
            "receive.advertisePushOptions",
        ):
            git(bare, "config", key, "true")
        seed = self.folder / "seed" / name
        git(self.folder, "init", "-q", "-b", "main", str(seed))
        for number in range(commits):
            commit(seed, f"file-{number}")
        git(seed, "push", "-q", str(bare), "main")
        return bare

    @property
    def requests(self) -> list[str]:
        log = self.folder / "requests.log"
        return log.read_text().splitlines() if log.exists() else []


def commit(folder: Path, name: str, content: bytes | None = None) -> str:
    """Commit a file. Returns the id."""
    (folder / name).write_bytes(content if content is not None else name.encode())
    git(folder, "add", name)
    git(folder, "commit", "-q", "-m", name)
    return git(folder, "rev-parse", "HEAD")


@contextlib.contextmanager
def git_server(folder: Path) -> Iterator[GitServer]:
    """Raises AssertionError if a program is missing: the tests need it."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    assert not missing, f"install them: apt-get install {' '.join(missing)}"
    for name in ("repositories", "temp"):
        (folder / name).mkdir()
    server = GitServer(folder, free_port())
    pair = base64.b64encode(f"{USER}:{SECRET}".encode()).decode()
    backend = Path(git(folder, "--exec-path")) / "git-http-backend"
    (folder / "nginx.conf").write_text(
        _NGINX.format(
            folder=folder, host=LOOPBACK, port=server.port, authorization=f"Basic {pair}", backend=backend
        )
    )
    nginx = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    running = {"fcgiwrap": ["fcgiwrap", "-s", f"unix:{folder}/cgi.sock"], "nginx": nginx}
    with contextlib.ExitStack() as stack:
        for name, argv in running.items():
            child = spawn(name, argv, log_path=folder / f"{name}.log", env=environment() | {"PATH": path})
            stack.callback(child.stop)
            ready = (folder / "cgi.sock").exists if name == "fcgiwrap" else lambda: _answers(server.port)
            child.wait_until(ready, _START_S, "takes connections")
        yield server


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0
