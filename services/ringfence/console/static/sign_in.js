// Sign-in: the person's passkey signs a session statement, which says that this console may read for them.
//
// The first time on a device the passkey is used twice: once to learn whose it is, and once to sign. A passkey can sign
// nothing else here: the trust bundle lets this origin produce session statements alone.

const ALG = "urn:ringfence:webauthn:ES256";
const PREFIX = new TextEncoder().encode("ringfence.webauthn.v1\0");
const KNOWN = "ringfence.passkey";
const TIMEOUT_MS = 120_000;

const page = document.getElementById("sign-in");
const button = document.getElementById("sign-in-button");
const other = document.getElementById("other-button");
const problem = document.getElementById("problem");

class RefusedError extends Error {}

const utf8 = (text) => new TextEncoder().encode(text);
const encode64 = (bytes) =>
  btoa(String.fromCharCode(...new Uint8Array(bytes))).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
const decode64 = (text) =>
  Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (char) => char.charCodeAt(0));

function known() {
  try {
    const passkey = JSON.parse(localStorage.getItem(KNOWN) ?? "null");
    return passkey && typeof passkey.user_id === "string" ? passkey : undefined;
  } catch {
    return undefined;
  }
}

async function post(path, body) {
  let response;
  try {
    response = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  } catch {
    throw new RefusedError("The console does not answer. Try again.");
  }
  let answer = {};
  try {
    answer = await response.json();
  } catch {
    // Judged by its status.
  }
  if (!response.ok) throw new RefusedError(answer.message ?? `The console answered ${response.status}.`);
  return answer;
}

async function touch(challenge, allowed) {
  let credential;
  try {
    credential = await navigator.credentials.get({
      publicKey: {
        challenge,
        rpId: page.dataset.rpId,
        allowCredentials: allowed.map((id) => ({ type: "public-key", id: decode64(id) })),
        userVerification: "required",
        timeout: TIMEOUT_MS,
      },
    });
  } catch (error) {
    const words = error.name === "NotAllowedError" ? "It was cancelled, took too long, or this device has no passkey of this installation." : `The passkey could not be used (${error.name}).`;
    throw new RefusedError(words);
  }
  if (credential === null) throw new RefusedError("Nothing was signed.");
  return credential;
}

// What the passkey signs in both touches: SHA-256 of the prefix and a text. A nonce has no period, so it is no message.
const challengeOf = (text) => crypto.subtle.digest("SHA-256", new Uint8Array([...PREFIX, ...utf8(text)]));

const assertionOf = ({ response }) =>
  encode64(utf8(JSON.stringify({
    ad: encode64(response.authenticatorData),
    cd: encode64(response.clientDataJSON),
    sig: encode64(response.signature),
  })));

async function find() {
  const nonce = encode64(crypto.getRandomValues(new Uint8Array(32)));
  const credential = await touch(await challengeOf(nonce), []);
  const credentialId = encode64(credential.rawId);
  const found = await post("/sign-in/find", { credential_id: credentialId, nonce, assertion: assertionOf(credential) });
  return { ...found, credential_id: credentialId };
}

async function sign(passkey) {
  const { typ, claims } = await post("/sign-in/begin", { user_id: passkey.user_id });
  const header = { alg: ALG, kid: passkey.kid, typ: `ringfence.${typ}+jwt` };
  const input = [header, claims].map((part) => encode64(utf8(JSON.stringify(part)))).join(".");
  const credential = await touch(await challengeOf(input), [passkey.credential_id]);
  return `${input}.${assertionOf(credential)}`;
}

async function guarded(work) {
  problem.hidden = true;
  for (const one of [button, other]) one.disabled = true;
  try {
    await work();
  } catch (error) {
    problem.textContent = error instanceof RefusedError ? error.message : "Something went wrong in this page. You are not signed in.";
    problem.hidden = false;
    if (!(error instanceof RefusedError)) console.error(error);
  } finally {
    for (const one of [button, other]) one.disabled = false;
  }
}

async function signIn(passkey) {
  let statement;
  try {
    statement = await sign(passkey);
    await post("/sign-in/finish", { statement });
  } catch (error) {
    // It may have ended, or belong to somebody else by now: the next try asks anew.
    localStorage.removeItem(KNOWN);
    offer();
    throw error;
  }
  localStorage.setItem(KNOWN, JSON.stringify(passkey));
  location.assign(page.dataset.next);
}

function offer() {
  const passkey = known();
  button.textContent = passkey ? `Sign in as ${passkey.user_id}` : "Sign in with a passkey";
  other.hidden = passkey === undefined;
}

button.addEventListener("click", () => guarded(async () => {
  const passkey = known();
  if (passkey) return signIn(passkey);
  const found = await find();
  problem.hidden = true;
  document.getElementById("who").textContent = `You are ${found.user_id}. Use your passkey once more, to sign that this console may read for you.`;
  return signIn(found);
}));
other.addEventListener("click", () => {
  localStorage.removeItem(KNOWN);
  offer();
  button.focus();
});
if (!window.PublicKeyCredential) {
  button.disabled = true;
  problem.textContent = "This browser knows no passkeys, or the page came without TLS.";
  problem.hidden = false;
}
offer();
