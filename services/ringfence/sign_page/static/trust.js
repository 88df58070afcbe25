// The trust bundle: which keys speak for which service, and on which origins people sign. The pinned root signed it.

import { RefusedError, thumbprint } from "./encoding.js";
import { LEEWAY_S, isTime, ordinaryKey, parse, verify } from "./jws.js";

// An origin with a member that its reader does not know counts for nothing.
const ORIGIN_MEMBERS = ["origin", "use", "not_before", "not_after"];

/** A verified trust bundle. */
export class Trust {
  constructor(bundle, config, now) {
    this.bundle = bundle;
    this.config = config;
    this.now = now;
  }

  /** The key `kid` of the service `iss`, if it has one of `roles` and the key is valid at `at`; else undefined. */
  serviceKey(iss, kid, roles, at) {
    const service = this.bundle.services.find((one) => one.id === iss && roles.some((role) => one.roles.includes(role)));
    return ordinaryKey(service?.keys, kid, at)?.jwk;
  }

  /** The origins with this use that are valid at `at`. */
  origins(use, at = this.now) {
    return (this.bundle.origins ?? [])
      .filter((one) => Object.keys(one).every((name) => ORIGIN_MEMBERS.includes(name)))
      .filter((one) => one.use === use && one.not_before <= at && !(one.not_after <= at))
      .map((one) => one.origin);
  }

  /** Verify a message that a service with one of `roles` signed, as of the time that it says. Returns its claims. */
  async signedBy(roles, typ, compact, what) {
    const jws = parse(compact, what);
    const jwk = this.serviceKey(jws.claims.iss, jws.header.kid, roles, jws.claims.iat);
    if (jwk === undefined) throw new RefusedError(`${what} is signed by no ${roles.join(" or ")} of the trust bundle`);
    await verify(jws, typ, jwk, this.config.trustDomain, what);
    if (jws.claims.iat > this.now + LEEWAY_S) throw new RefusedError(`${what} is dated in the future`);
    return jws.claims;
  }
}

/** Verify a trust bundle up to the pinned root. Throws RefusedError. `memory` has `getItem` and `setItem`. */
export async function loadTrust(compact, config, now, memory) {
  const root = await byAnyRoot(compact, "trust.bundle", config, "the trust bundle");
  const { claims } = root;
  if (root.kid !== config.trustRoot && !(await leads(config, root.kid, claims.handovers ?? []))) {
    throw new RefusedError(`the trust bundle is signed by root ${root.kid}; this page is for ${config.trustRoot}`);
  }
  if (!Array.isArray(claims.services) || !isTime(claims.exp) || !Number.isSafeInteger(claims.version)) {
    throw new RefusedError("the trust bundle is malformed");
  }
  if (now >= claims.exp) throw new RefusedError("the trust bundle has expired: nobody is believed until the next one");
  checkVersion(claims.version, config, memory);
  const trust = new Trust(claims, config, now);
  if (claims.rp_id !== config.rpId || !trust.origins("sign").includes(config.origin)) {
    throw new RefusedError(`the trust bundle does not name ${config.origin} as a page where people sign now`);
  }
  return trust;
}

// A bundle that was replaced may name keys that were taken from their service meanwhile.
function checkVersion(version, config, memory) {
  const name = `ringfence.trust.${config.trustRoot}`;
  const seen = Number(memory.getItem(name) ?? 0);
  if (version < seen) {
    throw new RefusedError(`the trust bundle has version ${version}; this browser has seen version ${seen}`);
  }
  if (version < config.leastVersion) {
    throw new RefusedError(`the trust bundle has version ${version}; this page takes none before ${config.leastVersion}`);
  }
  memory.setItem(name, String(version));
}

async function leads(config, wanted, handovers) {
  let at = config.trustRoot;
  for (const handover of handovers) {
    const root = await byAnyRoot(handover, "trust.handover", config, "a handover of the root");
    if (root.kid === at) at = await thumbprint(root.claims.next_root);
  }
  return at === wanted;
}

// Nothing vouches for the key in the header: the caller compares it with the pinned root, or with a handover.
async function byAnyRoot(compact, typ, config, what) {
  const jws = parse(compact, what);
  if (jws.claims.iss !== `spiffe://${config.trustDomain}/root` || !jws.header.jwk) {
    throw new RefusedError(`${what} is signed by no root of ${config.trustDomain}`);
  }
  await verify(jws, typ, jws.header.jwk, config.trustDomain, what);
  return { kid: jws.header.kid, claims: jws.claims };
}
