// Passkeys: signatures by `navigator.credentials.get`, and new ones by `create` (WebAuthn Level 3).
//
// What is signed is the JWS Signing Input of a message, so a signature is good for that one message alone. The third
// part of the JWS holds authenticator data, client data and the signature, in this order and nothing else.

import { RefusedError, decode64, encode64, fromUtf8, sha256, thumbprint, utf8 } from "./encoding.js";
import { parseObject } from "./strict_json.js";

const ALG = "urn:ringfence:webauthn:ES256";
const PREFIX = utf8("ringfence.webauthn.v1\0");
const ES256 = -7;
const TIMEOUT_MS = 300_000;
const [UP, UV, BE, AT] = [0x01, 0x04, 0x08, 0x40];

/** The passkeys of a user's record that this page can use now, the one that was added last first. */
export function usablePasskeys(state, config, now) {
  return state.keys
    .filter((key) => key.use === "webauthn" && key.rp_id === config.rpId && typeof key.credential_id === "string")
    .filter((key) => (key.not_before ?? 0) <= now && now < key.not_after)
    .reverse();
}

/** Sign claims with a passkey: one touch. `key` is `{kid, jwk, credential_id}`. Returns the compact JWS. */
export async function sign(typ, claims, key, config) {
  const header = { alg: ALG, kid: key.kid, typ: `ringfence.${typ}+jwt` };
  const signingInput = [header, claims].map((part) => encode64(utf8(JSON.stringify(part)))).join(".");
  const challenge = await challengeOf(utf8(signingInput));
  const credential = await prompted(() =>
    navigator.credentials.get({
      publicKey: {
        challenge,
        rpId: config.rpId,
        allowCredentials: [{ type: "public-key", id: decode64(key.credential_id) }],
        userVerification: "required",
        timeout: TIMEOUT_MS,
      },
    }),
  );
  const [data, client, signature] = [
    new Uint8Array(credential.response.authenticatorData),
    new Uint8Array(credential.response.clientDataJSON),
    new Uint8Array(credential.response.signature),
  ];
  await check(data, client, signature, challenge, key.jwk, [config.origin], config.rpId);
  const third = JSON.stringify({ ad: encode64(data), cd: encode64(client), sig: encode64(signature) });
  return `${signingInput}.${encode64(utf8(third))}`;
}

/** Make a passkey for a user. Returns its public part, as the package for `ringfence user add-key` has it. */
export async function create(userId, displayName, existing, config) {
  const credential = await prompted(async () =>
    navigator.credentials.create({
      publicKey: {
        challenge: crypto.getRandomValues(new Uint8Array(32)),
        rp: { id: config.rpId, name: `Ringfence ${config.trustDomain}` },
        // Not the user's id: a second passkey of theirs on the same device would replace the first.
        user: { id: crypto.getRandomValues(new Uint8Array(32)), name: userId, displayName },
        pubKeyCredParams: [{ type: "public-key", alg: ES256 }],
        authenticatorSelection: { residentKey: "preferred", userVerification: "required" },
        excludeCredentials: existing.map((key) => ({ type: "public-key", id: decode64(key.credential_id) })),
        attestation: "direct",
        timeout: TIMEOUT_MS,
      },
    }),
  );
  const { response } = credential;
  const jwk = await publicJwk(response);
  const data = new Uint8Array(response.getAuthenticatorData());
  if (!(data[32] & UP) || !(data[32] & UV)) throw new RefusedError("the authenticator did not verify who you are");
  return {
    jwk,
    kid: await thumbprint(jwk),
    credential_id: encode64(new Uint8Array(credential.rawId)),
    rp_id: config.rpId,
    aaguid: aaguid(data),
    backup_eligible: (data[32] & BE) !== 0,
    attestation_object: encode64(new Uint8Array(response.attestationObject)),
    client_data: encode64(new Uint8Array(response.clientDataJSON)),
  };
}

async function prompted(ask) {
  try {
    const credential = await ask();
    if (credential !== null) return credential;
  } catch (error) {
    if (error.name === "InvalidStateError") throw new RefusedError("this device has a passkey of yours already");
    if (error.name === "NotAllowedError") throw new RefusedError("nothing was signed: it was cancelled, or took too long");
    throw new RefusedError(`the passkey could not be used (${error.name})`);
  }
  throw new RefusedError("nothing was signed");
}

async function publicJwk(response) {
  const spki = response.getPublicKey();
  if (spki === null || response.getPublicKeyAlgorithm() !== ES256) {
    throw new RefusedError("this authenticator makes no ES256 keys; use another one");
  }
  const key = await crypto.subtle.importKey("spki", spki, { name: "ECDSA", namedCurve: "P-256" }, true, ["verify"]);
  const { kty, crv, x, y } = await crypto.subtle.exportKey("jwk", key);
  return { kty, crv, x, y };
}

function aaguid(data) {
  const hex = [...data.slice(37, 53)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

/**
 * Verify a message that somebody else signed with a passkey, `key` of their record, on one of `origins`. Services check
 * more of the authenticator data; no message that they refused is ever seconded. Throws RefusedError.
 */
export async function verifyPasskey(jws, key, origins, config, what) {
  if (jws.claims.aud !== config.trustDomain) throw new RefusedError(`${what} is for another trust domain`);
  if ((await thumbprint(key.jwk)) !== jws.header.kid) throw new RefusedError(`${what}: its key is not the one it names`);
  const parts = ASSERTION.exec(fromUtf8(jws.signature));
  if (parts === null) throw new RefusedError(`${what}: its signature is malformed`);
  const [data, client, signature] = parts.slice(1).map(decode64);
  await check(data, client, signature, await challengeOf(jws.signingInput), key.jwk, origins, config.rpId);
}

export const isByPasskey = (jws) => jws.header.alg === ALG;

const ASSERTION = /^\{"ad":"([\w-]+)","cd":"([\w-]+)","sig":"([\w-]+)"\}$/;

const challengeOf = (signingInput) => sha256(new Uint8Array([...PREFIX, ...signingInput]));

// What every verifier checks again: here only so that a person learns at once that something is wrong.
async function check(data, client, signature, challenge, jwk, origins, rpId) {
  const said = parseObject(fromUtf8(client));
  const flags = data[32];
  const rp = await sha256(utf8(rpId));
  if (
    said.type !== "webauthn.get" || said.challenge !== encode64(challenge) || !origins.includes(said.origin) ||
    said.crossOrigin === true || said.topOrigin !== undefined || !rp.every((byte, at) => data[at] === byte) ||
    !(flags & UP) || !(flags & UV) || flags & AT
  ) {
    throw new RefusedError("the authenticator signed something else, or did not verify who you are");
  }
  const plain = { kty: jwk.kty, crv: jwk.crv, x: jwk.x, y: jwk.y };
  const key = await crypto.subtle.importKey("jwk", plain, { name: "ECDSA", namedCurve: "P-256" }, false, ["verify"]);
  const signed = new Uint8Array([...data, ...(await sha256(client))]);
  if (!(await crypto.subtle.verify({ name: "ECDSA", hash: "SHA-256" }, key, rawSignature(signature), signed))) {
    throw new RefusedError("the signature is not by the passkey that was chosen");
  }
}

/** The raw R||S of a DER signature (RFC 3279), which WebCrypto wants. */
export function rawSignature(der) {
  const raw = new Uint8Array(64);
  let at = der[1] & 0x80 ? 3 : 2;
  for (const end of [32, 64]) {
    if (der[at] !== 0x02) throw new RefusedError("the signature is malformed");
    const length = der[at + 1];
    let value = der.slice(at + 2, at + 2 + length);
    while (value.length > 32 && value[0] === 0) value = value.slice(1);
    if (value.length > 32) throw new RefusedError("the signature is malformed");
    raw.set(value, end - value.length);
    at += 2 + length;
  }
  return raw;
}
