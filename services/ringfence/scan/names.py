"""Judges settings by name and value: whether a value is a secret, a reference to one, or a placeholder."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, Literal

from ringfence.scan.findings import limit_reached

NameKind = Literal["password", "secret", "none"]

_CAMEL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_SPLIT: Final = re.compile(r"[^a-z0-9]+")
_PASSWORD_WORDS: Final = frozenset(
    (
        "password",
        "passwd",
        "passphrase",
        "pass",
        "pwd",
        "pw",
        "pgpassword",
        "dbpassword",
        "dbpass",
        "userpass",
    )
)
_SECRET_WORDS: Final = frozenset(
    ("secret", "secrets", "token", "apikey", "apitoken", "authtoken", "accesstoken", "secretkey", "accesskey",
     "privatekey", "clientsecret", "bearer", "pat", "credential", "credentials", "webhook", "authkey", "jwt",
     "npmtoken",
     "githubtoken", "refreshtoken", "sessiontoken", "appkey", "authorization", "auth")
)  # fmt: skip
_KEY_BEFORE: Final = frozenset(
    ("api", "access", "secret", "private", "auth", "app", "account", "signing", "encryption", "master", "storage",
     "service", "license", "subscription", "application", "client", "deploy", "session", "admin", "root")
)  # fmt: skip
_NOT_A_VALUE_LAST: Final = frozenset(
    ("file", "files", "path", "dir", "folder", "name", "names", "id", "ids", "expiry", "expires", "expiration", "ttl",
     "length", "len", "count", "type", "types", "policy", "limit", "limits", "url", "uri", "endpoint", "host", "port",
     "enabled", "required", "ref", "provider", "manager", "store", "version", "prefix", "suffix", "field", "header",
     "min", "max", "size", "regex", "pattern", "hash", "algorithm", "alg", "hint", "label", "title", "description",
     "lifetime", "duration", "timeout", "mode", "method", "scope", "scopes", "issuer", "audience", "env", "command",
     "helper", "class", "format", "var", "variable", "placeholder", "rotation", "arn", "user", "username", "email",
     "status", "created", "updated", "at", "on", "in", "s", "ms", "days", "hours", "usage", "budget", "tokenizer",
     "mount", "volume", "backend", "engine", "plugin", "process", "sock", "socket", "flow", "domain", "region")
)  # fmt: skip
_NOT_SECRET_WORDS: Final = frozenset(
    ("public", "tokens", "tokenizer", "csrf", "example", "max", "total", "prompt")
)

_REFERENCE: Final = re.compile(
    r"""^(?:
      .*(?:\$\{|\$\(|\{\{|\{%|<%|%\(|\$\[\[).*          # templates
    | \$[A-Za-z_]\w*.* | \$\$?\w+                        # variables of shells
    | <[^<>]*> | %\w+% | \[[A-Za-z _-]+\] | @\w+@
    | !\w+\s.* | !(?:Ref|Sub|GetAtt|ImportValue|Join|include|reference)\b.*   # tags of YAML
    | (?:env|file|vault|op|ref|secret|aws-sm|gcpsm|azurekeyvault|keychain|keyring|ssm|doppler|sops|ENC)\s?[:\[(].*
    | op://.* | arn:aws[\w-]*:(?:secretsmanager|ssm).* | projects/[^/]+/secrets/.*
    | (?:os\.environ|os\.getenv|process\.env|getenv|env|System\.getenv|ENV|secrets|vars|var|local|data|module|self
        |config|settings|params|args|request|input|inputs)[.\[(].*
    | input:.*
    | (?:~|\.{1,2})?/[\w.@+-]+(?:/[\w.@+-]*)*            # a path
    | [A-Za-z]:\\.*
    )$""",
    re.VERBOSE | re.DOTALL,
)
_PLACEHOLDER: Final = re.compile(
    r"""(?:^(?:
      (?:my|your|the|some|any|an?|test|fake|sample|demo|default)?[\s_.-]*
      (?:password|passwd|pass|pwd|secret|token|key|api[\s_.-]?key|access[\s_.-]?token|client[\s_.-]?secret|credentials?)
      (?:[\s_.-]*(?:here|value|goes[\s_.-]?here))?
    | none | null | nil | true | false | yes | no | on | off | undefined | n/?a | unset | empty | string | optional
    | required | default | auto | disabled | enabled | prompt | ask | anonymous | guest | user | username | bearer
    | basic | todo | tbd | fixme | changeit | secretref
    )$)
    | change[\s_.-]?(?:me|this|it) | replace[\s_.-]?(?:me|this|with) | place[\s_.-]?holder | redacted | example
    | dummy | \byour[\s_.-]? | insert[\s_.-] | <.*> | x{5,} | \*{3,} | \.{3,} | _{5,} | \bfake\b | \btodo\b
    | enter[\s_.-]your | put[\s_.-]your | not[\s_.-]a?[\s_.-]?(?:real|secret) | lorem | foobar | sample
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SEQUENCES: Final = ("0123456789", "1234567890", "abcdefghij", "abcdef0123")
_WRAPS: Final = frozenset(("90", "za", "ZA", "f0", "F0"))
_COUNTED_RUN: Final = 12
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_SEGMENTS: Final = re.compile(r"[^A-Za-z0-9]+")
_SEGMENT: Final = re.compile(r"[A-Za-z0-9]+")
GENERATED_LENGTH: Final = 16
_RUN: Final = re.compile(r"[A-Za-z0-9_.+/=~-]{16,}")
MIN_PASSWORD: Final = 4
MIN_SECRET: Final = 8
_MAX_VALUE: Final = 16_384


@lru_cache(maxsize=4096)
def words_of(name: str) -> tuple[str, ...]:
    """Split the name of a setting into words: `dbPassword` and `DB_PASSWORD` give `db`, `password`."""
    return tuple(filter(None, _SPLIT.split(_CAMEL.sub("_", name[:200]).lower())))


@lru_cache(maxsize=4096)
def name_kind(name: str) -> NameKind:
    """Return whether a setting holds a password, another secret, or neither, judged by its name."""
    words = words_of(name)
    if not words or words[-1] in _NOT_A_VALUE_LAST or not _NOT_SECRET_WORDS.isdisjoint(words):
        return "none"
    if words[0] in ("has", "is", "use", "uses", "enable", "allow", "require", "show", "no", "num", "min"):
        return "none"
    if not _PASSWORD_WORDS.isdisjoint(words) or words[-1].endswith(("password", "passwd")):
        return (
            "none" if words[-1] in ("key", "keys") else "password"
        )  # `passwordKey`: where it is in a Secret
    if not _SECRET_WORDS.isdisjoint(words) or words[-1].endswith(("apikey", "token", "secret")):
        return "secret"
    if words[-1] == "key" and len(words) > 1 and words[-2] in _KEY_BEFORE:
        return "secret"
    return "none"


def is_reference(value: str) -> bool:
    """Return whether a value is a reference to a secret: a variable, a template, a path, an entry of a store."""
    return _REFERENCE.match(value) is not None


def is_placeholder(value: str) -> bool:
    """Return whether a value is a placeholder for a secret that somebody has to fill in."""
    if len(set(value)) <= 2 or _PLACEHOLDER.search(value) is not None:
        return True
    low = value.lower()
    return any(one in low for one in _SEQUENCES) and entropy(value) < 3.6


def is_counted(value: str) -> bool:
    """Return whether a value is a sequence (`0000000000`, `abcdefghijk`): in two fifths of it, or in one long run.

    Of random hexadecimal digits, an eighth equals the digit before or its successor.
    """
    steps = run = 0
    for before, after in itertools.pairwise(value):
        if (ord(after) - ord(before)) in (0, 1) or before + after in _WRAPS:
            steps += 1
            run += before + after != "AA"  # zero bytes in base64
            if run >= _COUNTED_RUN:
                return True
        else:
            run = 0
    return steps >= 0.4 * len(value)


def entropy(text: str) -> float:
    """Return the Shannon entropy of a text in bits for each character."""
    if not text:
        return 0.0
    total = len(text)
    return -sum(count / total * math.log2(count / total) for count in Counter(text).values())


def looks_random(value: str) -> bool:
    """Return whether a value looks generated, rather than written by a person or a name in a program."""
    if len(value) < MIN_SECRET or any(char.isspace() for char in value):
        return False
    segments = list(filter(None, _SEGMENTS.split(value)))
    if not segments or all(map(_is_word, segments)):
        return False
    if value.isalpha():
        mixed = value != value.lower() and value != value.upper()
        return entropy(value) >= (3.6 if mixed else 3.2)
    if not any(map(str.isdigit, value)):
        return len(value) >= 16 and entropy(value) >= 3.5
    return entropy(value) >= min(3.0, math.log2(len(value)) - 0.9)


def generated_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each part of a text that looks like a long generated value. UUIDs are none."""
    uuids = [match.span() for match in _UUID.finditer(text)]
    for run in _RUN.finditer(text):
        parts = [
            (begin, end)
            for begin, end in (match.span() for match in _SEGMENT.finditer(text, *run.span()))
            if not _is_word(text[begin:end])
            and not any(first <= begin and end <= last for first, last in uuids)
        ]
        length = sum(end - begin for begin, end in parts if not text[begin:end].isdigit())
        if length >= GENERATED_LENGTH and looks_random(run[0]):
            yield from parts


def is_generated(value: str) -> bool:
    """Return whether a part of a value looks like a long generated one."""
    return next(generated_spans(value), None) is not None


def _is_word(segment: str) -> bool:
    """Return whether a part of a value is a word, a name in camel case, a small number or a version."""
    if segment.isdigit():
        return len(segment) <= 4
    letters = segment.rstrip("0123456789")
    if len(segment) - len(letters) > 3 or not letters.isalpha():
        return False
    if letters.islower() or letters.isupper() or letters.istitle():
        return len(letters) < 16
    parts = _CAMEL.split(letters)
    return len(letters) / len(parts) >= 3.5


def is_secret(name: str, value: str) -> NameKind:
    """Return the kind of a literal secret, judged by name and value; `none` if the setting holds none."""
    kind = name_kind(name)
    if kind == "none":
        return "none"
    value = value.strip()
    if len(value) > _MAX_VALUE:
        limit_reached(
            f"has a setting like a secret of more than {_MAX_VALUE} characters, which was not judged"
        )
        return "none"
    if len(value) < MIN_PASSWORD or is_reference(value) or is_placeholder(value):
        return "none"
    if kind == "password":
        return "none" if value.lower() in words_of(name) else "password"
    return "secret" if looks_random(value) and not is_url(value) and not is_counted(value) else "none"


def is_url(value: str) -> bool:
    return "://" in value[:12]
