// Signed messages: JWTs in JWS compact serialisation, whose `typ` header names the message (RFC 7515, 8725).

import { RefusedError, decode64, fromUtf8, thumbprint, utf8 } from "./encoding.js";
import { parseObject } from "./strict_json.js";

const MAX_JWS_CHARS = 512 * 1024;
const ALGORITHMS = {
  ES256: { verify: { name: "ECDSA", hash: "SHA-256" }, import: { name: "ECDSA", namedCurve: "P-256" } },
  EdDSA: { verify: { name: "Ed25519" }, import: { name: "Ed25519" } },
};
/** How far a signer's clock may be ahead of this one, in seconds. */
export const LEEWAY_S = 30;

/** The parts of a compact JWS; nothing is verified. */
export function parse(compact, what) {
  if (typeof compact !== "string" || compact.length > MAX_JWS_CHARS) throw new RefusedError(`${what} is no JWS`);
  const parts = compact.split(".");
  if (parts.length !== 3) throw new RefusedError(`${what} is no JWS in compact serialisation`);
  try {
    const header = parseObject(fromUtf8(decode64(parts[0])));
    const claims = parseObject(fromUtf8(decode64(parts[1])));
    if ("crit" in header || "b64" in header) throw new RefusedError("its header is not understood");
    for (const name of ["alg", "kid", "typ"]) {
      if (typeof header[name] !== "string") throw new RefusedError(`its header lacks ${name}`);
    }
    if (typeof claims.iss !== "string" || typeof claims.jti !== "string" || !isTime(claims.iat)) {
      throw new RefusedError("its claims lack iss, iat or jti");
    }
    const signature = decode64(parts[2]);
    return { compact, header, claims, signature, signingInput: utf8(`${parts[0]}.${parts[1]}`) };
  } catch (error) {
    if (error instanceof RefusedError) throw new RefusedError(`${what}: ${error.message}`);
    throw error;
  }
}

export const isTime = (value) => Number.isSafeInteger(value) && value >= 0;

/** The algorithm of a public JWK that signs; undefined for any other key. */
export function algorithm(jwk) {
  if (jwk?.kty === "EC" && jwk.crv === "P-256") return "ES256";
  return jwk?.kty === "OKP" && jwk.crv === "Ed25519" ? "EdDSA" : undefined;
}

/** Throws RefusedError unless this key signed this message, as that type, for this trust domain. */
export async function verify(jws, typ, jwk, domain, what) {
  if (jws.header.typ !== `ringfence.${typ}+jwt`) throw new RefusedError(`${what} is no ${typ}`);
  if (jws.claims.aud !== domain) throw new RefusedError(`${what} is for another trust domain`);
  const alg = algorithm(jwk);
  if (alg === undefined || jws.header.alg !== alg) throw new RefusedError(`${what}: its algorithm is not its key's`);
  if ((await thumbprint(jwk)) !== jws.header.kid) throw new RefusedError(`${what}: its key is not the one it names`);
  const plain = { kty: jwk.kty, crv: jwk.crv, x: jwk.x, ...(jwk.kty === "EC" ? { y: jwk.y } : {}) };
  const { verify: how, import: as } = ALGORITHMS[alg];
  let holds;
  try {
    const key = await crypto.subtle.importKey("jwk", plain, as, false, ["verify"]);
    holds = await crypto.subtle.verify(how, key, jws.signature, jws.signingInput);
  } catch {
    throw new RefusedError(`${what}: this browser cannot use its key (${alg})`);
  }
  if (!holds) throw new RefusedError(`${what}: its signature does not verify`);
}

/** The key record `kid` of `keys` that is valid at `at`, and for ordinary signatures; undefined where there is none. */
export const ordinaryKey = (keys, kid, at) =>
  (Array.isArray(keys) ? keys : []).find(
    (key) => key.kid === kid && key.use === undefined && (key.not_before ?? 0) <= at && at < key.not_after,
  );
