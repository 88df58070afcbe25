// Proposals: widening commands of others, as their authors signed them, and the state that each leads to.
//
// The page computes that state itself, by the rules of ringfence/model/lifecycle, from the subject's record and the
// command. A test compares both. It refuses commands that it does not know, and subjects that are held in part.

import { RefusedError, digest } from "./encoding.js";

const COMMON = ["iss", "aud", "iat", "jti", "exp"];

/** Keys that a whole state lists, and the former ones, which end at `at`. */
function listed(state, keys, at) {
  const former = (state?.keys ?? []).filter((one) => !keys.some((key) => key.kid === one.kid));
  return [...keys, ...former.map((key) => ended(key, at))];
}

const ended = (key, at) => ({ ...key, not_after: Math.min(key.not_after, at) });

function userSet(claims, state, at) {
  if (state?.delegation) throw new RefusedError("its subject is a provisioner, and no person");
  if (claims.provisioned && !state?.provisioned) throw new RefusedError("its subject comes from no provisioner");
  const provisioned = claims.provisioned && { ...claims.provisioned, by: state.provisioned.by, blocked: false, gone: false };
  return {
    user_id: claims.user_id, name: claims.name, roles: claims.roles, keys: listed(state, claims.keys, at),
    entitlements: claims.entitlements, status: provisioned?.active ?? true ? "active" : "disabled",
    compromised: state?.compromised, provisioned,
  };
}

function provisionerSet(claims, state, at) {
  if (state !== undefined && !state.delegation) throw new RefusedError("its subject is a person, and no provisioner");
  const delegated = claims.delegation.groups.map((one) => one.group);
  return {
    user_id: claims.provisioner_id, name: claims.name, keys: listed(state, claims.keys, at),
    entitlements: { scope: [], source: "delegation", as_of: claims.iat }, status: "active",
    delegation: claims.delegation, linked: (state?.linked ?? []).filter((one) => delegated.includes(one.group)),
  };
}

function register(claims, state) {
  if (state !== undefined) throw new RefusedError("there is an agent of this name");
  return {
    agent_id: claims.agent_id, sponsor: claims.sponsor, description: claims.description, keys: claims.keys,
    ceiling: claims.ceiling, limits: claims.limits, status: claims.inactive ? "registered" : "active", suspended_by_operator: false,
    attestation: claims.attestation,
  };
}

function rotateKey(claims, state, at) {
  const replaced = new Set(claims.replaces ?? state.keys.map((key) => key.kid));
  if (claims.compromised) {
    for (const kid of replaced) {
      // A set grows while it is walked: so all renewals of a key come in.
      (state.renewed ?? []).filter((one) => one.kid === kid).forEach((one) => replaced.add(one.successor));
    }
  }
  const named = state.keys.map((key) => key.kid).filter((kid) => replaced.has(kid));
  if (named.length < replaced.size) throw new RefusedError("its subject has no such key");
  const keys = state.keys.map((key) => (replaced.has(key.kid) ? ended(key, at + (claims.overlap_s ?? 0)) : key));
  const joined = (known, more) => [...new Set([...(known ?? []), ...more])];
  return {
    ...state, keys: [...(claims.key ? [claims.key] : []), ...keys], replaced: joined(state.replaced, named),
    compromised: joined(state.compromised, claims.compromised ? named : []),
  };
}

const targetSet = (claims) => ({
  target_id: claims.target_id, description: claims.description, backend: claims.backend, verbs: claims.verbs,
  requests: claims.requests, max_ttl_s: claims.max_ttl_s, keys: claims.keys, status: "active",
  delivery: claims.delivery ?? "by default: the gateway, if it can make the credential's requests; else the agent",
});

const present = (fold) => (claims, state, at) => {
  if (state === undefined) throw new RefusedError("there is no record of its subject");
  return fold(claims, state, at);
};
const command = (kind, id, fold, needed, optional = []) => ({ kind, id, fold, needed: [id, ...needed], optional });

const COMMANDS = {
  "user.set": command("user", "user_id", userSet, ["name", "roles", "keys", "entitlements"], ["provisioned", "revision"]),
  "user.add-key": command(
    "user", "user_id", present((claims, state) => (
      { ...state, keys: [claims.key, ...state.keys.filter((one) => one.kid !== claims.key.kid)] }
    )), ["key"], ["invitation", "possession", "endorsement"],
  ),
  "provisioner.set": command("user", "provisioner_id", provisionerSet, ["name", "keys", "delegation"], ["revision"]),
  "agent.register": command(
    "agent", "agent_id", register, ["sponsor", "description", "keys", "ceiling", "attestation"], ["limits", "inactive"],
  ),
  "agent.set-ceiling": command(
    "agent", "agent_id", present((claims, state) => (
      { ...state, ceiling: claims.ceiling, limits: claims.limits }
    )), ["ceiling"], ["limits", "revision"],
  ),
  "agent.set-attestation": command(
    "agent", "agent_id", present((claims, state) => ({ ...state, attestation: claims.attestation })), ["attestation"], ["revision"],
  ),
  "agent.transfer": command(
    "agent", "agent_id", present((claims, state) => (
      { ...state, sponsor: claims.sponsor, without_consent: claims.without_consent }
    )), ["sponsor"], ["consent", "without_consent"],
  ),
  "agent.resume": command(
    "agent", "agent_id", present((claims, state) => ({ ...state, status: "active", suspended_by_operator: false })), ["reason"],
  ),
  "agent.rotate-key": command(
    "agent", "agent_id", present(rotateKey), [], ["key", "replaces", "overlap_s", "compromised", "reason"],
  ),
  "target.set": command(
    "target", "target_id", targetSet, ["description", "backend", "verbs", "requests", "max_ttl_s", "keys"],
    ["delivery", "revision"],
  ),
};

/** The members that this page shows of each command. A test compares them with what services read. */
export const PROPOSED_MEMBERS = Object.fromEntries(
  Object.entries(COMMANDS).map(([typ, { needed, optional }]) => [typ, [...needed, ...optional]]),
);

/** The state of a command's subject after it took effect at `at` (seconds). `state` is undefined if there is none. */
export function stateAfter(typ, claims, state, at) {
  const known = COMMANDS[typ];
  if (known === undefined) throw new RefusedError("this page cannot show this command; second it with a key file");
  const members = [...known.needed, ...known.optional, ...COMMON];
  if (Object.keys(claims).some((name) => !members.includes(name)) || known.needed.some((name) => !(name in claims))) {
    throw new RefusedError("the proposed command has a member that this page does not know, or lacks one");
  }
  if (state?.holds?.length > 0) {
    throw new RefusedError("its subject rests on a compromised key, and this page does not show what becomes of that; second it with a key file");
  }
  return known.fold(claims, state, at);
}

/** The members in which two states differ, as `[name, before, after]`. What is empty or missing is undefined. */
export function changesOf(before, after) {
  const names = [...new Set([...Object.keys(before ?? {}), ...Object.keys(after)])];
  const changed = names.map((name) => [name, value(before?.[name]), value(after[name])]);
  return changed.filter(([, one, other]) => JSON.stringify(sorted(one)) !== JSON.stringify(sorted(other)));
}

const value = (one) => (one === null || one === false || (Array.isArray(one) && one.length === 0) ? undefined : one);

/** A copy whose members are in one order, to compare by. */
export function sorted(one) {
  if (Array.isArray(one)) return one.map(sorted);
  if (typeof one !== "object" || one === null) return one;
  return Object.fromEntries(Object.keys(one).sort().map((key) => [key, sorted(one[key])]));
}

/**
 * Verify a proposed command by its author's record, and compute what it changes by its subject's record.
 * Returns `{typ, claims, author, digest, kind, id, revision, now, then}`; `revision` is 0 where there is no record.
 */
export async function proposedCommand(compact, evidence) {
  const { typ, claims, signer, byPasskey } = await evidence.signedByPerson(compact, "the proposed command");
  const known = COMMANDS[typ];
  if (byPasskey && known?.kind !== "agent") throw new RefusedError(`no passkey proposes ${typ}`);
  const id = known && claims[known.id];
  const record = typeof id === "string" ? evidence.find(known.kind, id) : undefined;
  const then = stateAfter(typ, claims, record?.state, evidence.now);
  return {
    typ, claims, author: signer.user_id, digest: await digest(compact.slice(0, compact.lastIndexOf("."))),
    kind: known.kind, id, revision: record?.named ?? 0, now: record?.state, then,
  };
}
