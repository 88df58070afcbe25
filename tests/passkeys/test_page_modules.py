"""The page's own modules in a real browser, beside the Python code that they repeat."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest

from ringfence.client.passkeys.questions import BEGIN, END, unwrapped
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.base.text import visible, visible_name, visible_resource
from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode
from ringfence.messages.base import Claims
from ringfence.messages.registry import KeyPossession
from tests.passkeys.browser import Person
from tests.support.sign_page import Site


@pytest.fixture
async def modules(site: Site, person: Person) -> Person:
    """A person on the page, where its modules can be called."""
    await person.page.goto(site.sign)
    return person


async def call(person: Person, module: str, function: str, *arguments: Any) -> Any:
    """The results of a function of a module, for each of a list of arguments; `None` where it refuses."""
    script = f"""async (many) => {{
      const {{ {function} }} = await import("./{module}.js");
      const one = async (value) => {{ try {{ return await {function}(...value); }} catch {{ return null; }} }};
      const results = await Promise.all(JSON.parse(many).map(one));
      return JSON.stringify(results, (_, value) => value instanceof Uint8Array ? [...value] : value);
    }}"""
    # As text: the browser's own protocol takes half a minute for all code points.
    return json.loads(await person.page.evaluate(script, json.dumps(arguments)))


async def test_unwrapped_links_wrap_to_the_same_text(modules: Person) -> None:
    inner = '{"a":"' + b64encode('{"b":"ü"}'.encode()) + '"}'
    texts = ["{}", '{"jws":"' + b64encode(inner.encode()) + "." + b64encode(b'{"c":1}') + '.AAAA"}']
    assert unwrapped(texts[1]).count(BEGIN) == 3
    assert await call(modules, "exchange", "wrapped", *((unwrapped(text),) for text in texts)) == texts
    deep = BEGIN * 9 + END * 9
    damaged = [BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{{}}", deep, BEGIN * 8 + "x" * 2**20 + END * 8]
    assert await call(modules, "exchange", "wrapped", *((text,) for text in damaged)) == [None] * len(damaged)


async def test_text_is_shown_as_on_the_terminal(modules: Person) -> None:
    """Every code point, but those that are unassigned in one of the two versions of Unicode."""
    chars = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    known = [char for char in chars if unicodedata.category(char) != "Cn"]
    for name, ours in (("visible", visible), ("visibleName", visible_name)):
        shown = await call(modules, "text", name, *((char,) for char in known))
        assert [char for char, text in zip(known, shown, strict=True) if text != ours(char)] == []


async def test_a_resource_is_quoted_as_on_the_terminal(modules: Person) -> None:
    texts = ["env/web", "env/a  at  other", 'b", read  on  "c', "d,e", "prоd", "prоd f", "arn:x/*"]
    shown = await call(modules, "text", "visibleResource", *((text,) for text in texts))
    assert shown == [visible_resource(text) for text in texts]


async def test_ids_digests_and_encodings_are_the_same(modules: Person) -> None:
    iss = "spiffe://acme.example/agent/bot"
    assert await call(modules, "encoding", "messageId", (iss, "a"), (iss, "ü")) == [
        message_id(iss, "a"), message_id(iss, "ü"),
    ]  # fmt: skip
    keys = [SigningKey.generate(iss, alg) for alg in ("ES256", "EdDSA")]
    found = await call(modules, "encoding", "thumbprint", *((key.public.model_dump(),) for key in keys))
    assert found == [key.kid for key in keys]


def python_decodes(text: str) -> list[int] | None:
    try:
        return list(b64decode(text))
    except ValueError:
        return None


async def test_base64url_is_read_as_strictly(modules: Person) -> None:
    alphabet = "AQgw-_z9+/= "
    texts = ["", "A", "AA", "AB", "AAA", "AAB", "AAAA", "AAAA=", "QQ==", b64encode(bytes(range(256)))]
    texts += [a + b + c + d for a in alphabet for b in alphabet for c in alphabet for d in ("", "A", "=")]
    script = """async (many) => {
      const { decode64, encode64 } = await import("./encoding.js");
      const read = (raw) => [[...raw], encode64(raw)];
      const one = (text) => { try { return read(decode64(text)); } catch { return [null, null]; } };
      return many.map(one);
    }"""
    for text, (raw, again) in zip(texts, await modules.page.evaluate(script, texts), strict=True):
        assert raw == python_decodes(text), text
        assert again in (None, text)


DOCUMENTS = [
    "{}",
    "[]",
    '{"a":1}',
    '{"a":1,"a":1}',
    '{"a":{"b":1,"b":2}}',
    '{"a":1,"\\u0061":2}',
    '{"a":1}x',
    '{"a":1,}',
    "{'a':1}",
    '{"a":01}',
    '{"a":1e400}',
    '{"a":-0}',
    '{"a":1.5}',
    '{"a":"\\ud800"}',
    '{"a":"\\ud83d\\ude00"}',
    '{"a":"\t"}',
    '{"a":nul}',
    '{"a":true,"b":false,"c":null}',
    '{"__proto__":1}',
    '{"constructor":{"x":1}}',
    '{"toString":1,"toString":2}',
    "\ufeff{}",
    "",
    '{"a":[1,2,{"b":[]}]}',
    ' {\n"a" : [ 1 , 2 ] }\r\n',
    '{"a":NaN}',
    '{"a":+1}',
    '{"a":.5}',
    '{"a":1.}',
    '{"a":"\\x"}',
    '{"a"}',
    "{,}",
    '{"a":1 "b":2}',
    '"a"',
    "1",
    "null",
    '{"a":9007199254740991}',
    "{" * 1000,
    '{"a":' * 500 + "1" + "}" * 500,
]
"""What is JSON and what is none, each in ways in which parsers differ."""


def python_reads(text: str) -> str | None:
    try:
        return json.dumps(json_object(text.encode()), sort_keys=True)
    except ValueError:
        return None


async def test_json_is_read_as_strictly(modules: Person) -> None:
    script = """async (many) => {
      const { parseObject } = await import("./strict_json.js");
      const one = (text) => { try { return JSON.stringify(parseObject(text)); } catch { return null; } };
      return many.map(one);
    }"""
    for text, read in zip(DOCUMENTS, await modules.page.evaluate(script, DOCUMENTS), strict=True):
        ours = python_reads(text)
        if len(text) > 400 and read is None:
            continue  # the page takes less depth
        assert (read is None) == (ours is None), text[:60]
        if read is not None and ours is not None:
            assert json.loads(read) == json.loads(ours), text[:60]


def signed_on_the_page() -> Iterator[type[Claims]]:
    """All messages with the use `sign`, but the one of enrolment, which is no question."""
    pending = list(Claims.__subclasses__())
    while pending:
        model = pending.pop()
        pending += model.__subclasses__()
        ours = model.__module__.startswith("ringfence.") and model is not KeyPossession
        if ours and model.passkey_use == "sign":
            yield model


async def test_the_page_shows_each_member_of_each_message_that_passkeys_sign(modules: Person) -> None:
    """A member that the page does not know is refused there, until somebody writes how it is shown."""
    shown = await modules.page.evaluate("async () => (await import('./messages.js')).MEMBERS")
    stamped = {"iss", "aud", "iat", "jti", "exp"}
    # Only instances of agents have an enrolment.
    assert {typ: set(members) for typ, members in shown.items()} == {
        model.typ: set(model.model_fields) - stamped - {"enrolment"} for model in signed_on_the_page()
    }


async def test_end_of_compromised_key_is_shown_with_its_time_and_what_it_voids(modules: Person) -> None:
    script = """async (more) => {
      const { describe } = await import("./messages.js");
      const record = () => ({ state: { user_id: "sam", keys: [{ kid: "k" }] } });
      const claims = { user_id: "sam", kid: "k", reason: "stolen", exp: 2000000000, compromised: true, ...more };
      try {
        return await describe("user.end-key", claims, { used: new Map(), now: 1, record }, {});
      } catch { return null; }
    }"""
    assert await modules.page.evaluate(script, {}) is None
    shown = await modules.page.evaluate(script, {"since_ms": 1_790_000_000_000})
    assert "2026-09-21T14:13:20Z" in {row["label"]: row["text"] for row in shown["rows"]}["Since"]
    assert any("keys of other people and of agents" in one for one in shown["warnings"])
