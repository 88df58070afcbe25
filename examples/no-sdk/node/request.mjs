// Request a credential over HTTP from Node.js, without an SDK: jose for the messages, fetch for HTTP.
//
//   node request.mjs KEY_FILE TASK_ID TARGET VERB RESOURCE
//
// Reads RINGFENCE_DOOR (the gateway's URL), RINGFENCE_TRUST_DOMAIN and RINGFENCE_TRUST_ROOT. Verifies the reply by the
// trust bundle, and prints it without the credential itself.

import { randomUUID } from "node:crypto";
import { readFile } from "node:fs/promises";
import { calculateJwkThumbprint, compactDecrypt, compactVerify, decodeProtectedHeader, exportJWK, generateKeyPair, importJWK, SignJWT } from "jose";

const door = `${process.env.RINGFENCE_DOOR ?? "http://127.0.0.1:8707"}/ringfence`;
const trustDomain = process.env.RINGFENCE_TRUST_DOMAIN ?? "ringfence.local";
const [keyFile, taskId, target, verb, resource] = process.argv.slice(2);
if (resource === undefined) throw new Error("usage: request.mjs KEY_FILE TASK_ID TARGET VERB RESOURCE");

const me = JSON.parse(await readFile(keyFile, "utf8"));
const alg = me.jwk.kty === "EC" ? "ES256" : "EdDSA";
const { d, ...publicJwk } = me.jwk;
const key = await importJWK(me.jwk, alg);
const now = () => Math.floor(Date.now() / 1000);

/** Call the gateway with a DPoP proof (RFC 9449): once more with the nonce that the first answer brings. */
let nonce;
async function call(method, path, body) {
  for (let attempt = 0; ; attempt += 1) {
    const htu = door + path.split("?")[0];
    const proof = await new SignJWT({ jti: randomUUID(), htm: method, htu, ...(nonce && { nonce }) })
      .setIssuedAt().setProtectedHeader({ alg, typ: "dpop+jwt", jwk: publicJwk }).sign(key);
    const answer = await fetch(door + path, { method, body, headers: { DPoP: proof, "Content-Type": "application/jose" } });
    nonce = answer.headers.get("DPoP-Nonce") ?? nonce;
    if (answer.ok) return answer;
    if (attempt > 0 || answer.status !== 401) throw new Error(`${answer.status}: ${await answer.text()}`);
  }
}

/** The claims of a message of this type, signed by one of `keys` (by thumbprint). */
async function verified(compact, type, keys) {
  const header = decodeProtectedHeader(compact);
  if (header.typ !== `ringfence.${type}+jwt`) throw new Error(`this is no ${type}`);
  const found = keys.get(header.kid);
  if (found === undefined) throw new Error(`the ${type} is signed by another key`);
  const { payload } = await compactVerify(compact, found, { algorithms: ["ES256", "EdDSA"] });
  return JSON.parse(new TextDecoder().decode(payload));
}

const usable = (jwk) => importJWK(Object.fromEntries(Object.entries(jwk).filter(([, value]) => value)), jwk.kty === "EC" ? "ES256" : "EdDSA");

/** The keys that policy and issuer sign with now, by the trust bundle, which the pinned root signed. */
async function serviceKeys(bundle) {
  const { jwk, kid } = decodeProtectedHeader(bundle);
  if ((await calculateJwkThumbprint(jwk)) !== process.env.RINGFENCE_TRUST_ROOT) throw new Error("another root signed the trust bundle");
  const { services } = await verified(bundle, "trust.bundle", new Map([[kid, await usable(jwk)]]));
  const keys = { policy: new Map(), issuer: new Map() };
  for (const service of services) {
    for (const role of service.roles.filter((one) => one in keys)) {
      for (const record of service.keys.filter((one) => one.not_before <= now() && now() < one.not_after)) {
        keys[role].set(record.kid, await usable(record.jwk));
      }
    }
  }
  return keys;
}

const reply = await generateKeyPair("ECDH-ES", { crv: "P-256", extractable: true });
const request = await new SignJWT({
  task_id: taskId, scope: [{ target, verbs: [verb], resources: [resource] }], ttl_s: 300, reason: "an example in Node.js",
  reply_key: await exportJWK(reply.publicKey),
}).setIssuer(me.id).setAudience(trustDomain).setIssuedAt().setExpirationTime("60s").setJti(randomUUID())
  .setProtectedHeader({ alg, kid: await calculateJwkThumbprint(publicJwk), typ: "ringfence.credential.request+jwt" }).sign(key);

const { id } = await (await call("POST", "/v1/requests", request)).json();
const keys = await serviceKeys(await (await call("GET", "/v1/trust")).text());
for (let count = 0; ; ) {
  const answer = await call("GET", `/v1/requests/${id}?wait=30s&after=${count}`);
  if (answer.status === 202) continue; // no reply yet
  count += 1;
  const { plaintext } = await compactDecrypt(await answer.text(), reply.privateKey);
  const parts = JSON.parse(new TextDecoder().decode(plaintext));
  const decision = await verified(parts.decision, "credential.decision", keys.policy);
  if (decision.request !== request) throw new Error("the decision is about another request");
  let result;
  if (parts.refusal) result = { outcome: "refused", reasons: (await verified(parts.refusal, "issuer.refusal", keys.issuer)).reasons };
  else if (parts.delivery) {
    const { value, ...credential } = (await verified(parts.delivery, "credential.delivery", keys.issuer)).credential;
    result = { outcome: "allowed", credential };
  } else if (parts.lease) result = { outcome: "allowed", lease: (await verified(parts.lease, "lease", keys.issuer)).lease_id };
  else if (decision.outcome === "denied") result = { outcome: "denied", reasons: decision.reasons };
  if (result !== undefined) {
    console.log(JSON.stringify(result));
    break;
  }
  console.error(`${decision.outcome}: waiting`);
}
