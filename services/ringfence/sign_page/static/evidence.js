// Evidence: the signed messages that come with a question. Nothing of a question is shown before this verified it.
//
// Records count if a registry of the trust bundle signed them; requests of agents if a key of the agent's record did.
// The services check more (chains of commands, freshness); what a person signs here still has to pass them.
// A registry signs each revision of a record, and anybody may keep an old one: so this browser remembers the highest
// revision of each subject that it saw.

import { RefusedError, digest, messageId } from "./encoding.js";
import { LEEWAY_S, isTime, ordinaryKey, parse, verify } from "./jws.js";
import { isByPasskey, usablePasskeys, verifyPasskey } from "./passkeys.js";

const KINDS = ["user", "agent", "target", "task"];
const MAX_RECORDS = 256;
const DAY_S = 86400;

/** The verified evidence of one question. `memory` has `getItem` and `setItem`. */
export class Evidence {
  constructor(trust, config, now, memory) {
    this.trust = trust;
    this.config = config;
    this.now = now;
    this.memory = memory;
    this.records = new Map();
    /** The records that were read since it was emptied: what is shown rests on them. */
    this.used = new Map();
  }

  /** Verify records (compact JWSs) and keep them. */
  async addRecords(compacts) {
    if (!Array.isArray(compacts) || compacts.length > MAX_RECORDS) throw new RefusedError("its records are no list");
    for (const compact of compacts) {
      const typ = /^ringfence\.(\w+)\+jwt$/.exec(parse(compact, "a record").header.typ)?.[1];
      if (!KINDS.includes(typ)) throw new RefusedError("a record is of no known kind");
      const claims = await this.trust.signedBy(["registry"], typ, compact, `a record of a ${typ}`);
      const id = claims.state?.[`${typ}_id`];
      if (typeof id !== "string" || claims.sub !== `spiffe://${this.config.trustDomain}/${typ}/${id}`) {
        throw new RefusedError(`the record of a ${typ} is about something else than it says`);
      }
      const key = `${typ}/${id}`;
      if (this.records.has(key)) throw new RefusedError(`the record of ${typ} ${id} comes twice`);
      if (!Number.isSafeInteger(claims.revision)) throw new RefusedError(`the record of ${typ} ${id} has no revision`);
      const seen = this.highestSeen(key, claims.revision);
      const { revision, state } = claims;
      const named = revision - (typ === "agent" ? (state.renewed ?? []).length : (claims.minor ?? 0));
      this.records.set(key, { typ, id, state, revision, named, at: claims.iat, seen });
    }
  }

  /** The highest revision of a subject that this browser saw, with this one. */
  highestSeen(subject, revision) {
    const name = `ringfence.revision.${this.config.trustRoot}.${subject}`;
    const seen = Number(this.memory.getItem(name) ?? 0);
    if (revision <= seen) return seen;
    this.memory.setItem(name, String(revision));
    return revision;
  }

  /** The verified record of `typ` with this id. Throws RefusedError where it did not come. */
  record(typ, id) {
    const record = this.find(typ, id);
    if (record === undefined) throw new RefusedError(`the record of ${typ} ${String(id).slice(0, 80)} is missing`);
    return record;
  }

  /** As `record`, undefined where it did not come. */
  find(typ, id) {
    const key = `${typ}/${id}`;
    const record = this.records.get(key);
    if (record !== undefined) this.used.set(key, record);
    return record;
  }

  /** The SPIFFE ID's last part, if it is of that kind in this trust domain. */
  subject(typ, iss) {
    const prefix = `spiffe://${this.config.trustDomain}/${typ}/`;
    return typeof iss === "string" && iss.startsWith(prefix) ? iss.slice(prefix.length) : undefined;
  }

  /** Verify a message that a user signed with a key file that was valid then. Returns its claims. */
  async signedByUser(typ, compact, what) {
    const jws = parse(compact, what);
    const { state } = this.record("user", this.subject("user", jws.claims.iss));
    const key = ordinaryKey(state.keys, jws.header.kid, jws.claims.iat);
    if (state.status !== "active" || key === undefined) {
      throw new RefusedError(`${what} is signed by no valid key file of ${state.user_id}`);
    }
    await verify(jws, typ, key.jwk, this.config.trustDomain, what);
    return { claims: jws.claims, signer: state };
  }

  /** Verify a message that a user signed with a key file, or with a passkey. Returns its type and claims, and who. */
  async signedByPerson(compact, what) {
    const jws = parse(compact, what);
    const typ = /^ringfence\.([a-z.-]+)\+jwt$/.exec(jws.header.typ)?.[1];
    if (typ === undefined) throw new RefusedError(`${what} is of no known type`);
    if (!isByPasskey(jws)) return { typ, byPasskey: false, ...(await this.signedByUser(typ, compact, what)) };
    const { claims, header } = jws;
    const { state } = this.record("user", this.subject("user", claims.iss));
    const key = usablePasskeys(state, this.config, claims.iat).find((one) => one.kid === header.kid);
    if (state.status !== "active" || key === undefined) {
      throw new RefusedError(`${what} is signed by no valid passkey of ${state.user_id}`);
    }
    await verifyPasskey(jws, key, this.trust.origins("sign", claims.iat), this.config, what);
    return { typ, byPasskey: true, claims, signer: state };
  }

  /** Verify a request as its agent signed it: with a key of its record, or with one that the registry enrolled. */
  async agentRequest(compact) {
    const what = "the agent's request";
    const jws = parse(compact, what);
    const { claims, header } = jws;
    const { state } = this.record("agent", this.subject("agent", claims.iss));
    let jwk = ordinaryKey(state.keys, header.kid, claims.iat)?.jwk;
    let instance;
    if (claims.enrolment !== undefined) {
      instance = await this.trust.signedBy(["registry"], "instance.enrolment", claims.enrolment, "its enrolment");
      const fits = instance.sub === claims.iss && ordinaryKey([instance.key], header.kid, claims.iat);
      jwk = fits ? instance.key.jwk : undefined;
    }
    if (jwk === undefined) throw new RefusedError(`${what} is signed by no valid key of agent ${state.agent_id}`);
    await verify(jws, "credential.request", jwk, this.config.trustDomain, what);
    return { claims, instance, id: await messageId(claims.iss, claims.jti), digest: await digest(compact) };
  }

  /**
   * The records that a credential or an action is about, each at the revision that `revisions` names. Renewals of an
   * agent's keys are not counted.
   */
  ground(agentId, taskId, targetId, revisions) {
    const [agent, task, target] = [
      this.record("agent", agentId),
      this.record("task", taskId),
      this.record("target", targetId),
    ];
    const user = this.record("user", task.state.on_behalf_of);
    if (task.state.agent_id !== agentId) throw new RefusedError("the task is another agent's");
    const named = { agent, task, target, user };
    for (const [kind, record] of Object.entries(named)) {
      if (revisions?.[kind] !== record.named) {
        throw new RefusedError(`the record of the ${kind} has revision ${record.named}, and another one is signed`);
      }
    }
    return { agent: agent.state, task: task.state, target: target.state, user: user.state };
  }
}

/** Verify an invitation: signed by the person themselves, or by an operator, with a key file. Returns what it says. */
export async function verifyInvitation(evidence, compact) {
  const { claims, signer } = await evidence.signedByUser("user.invite", compact, "the invitation");
  if (!isTime(claims.exp) || claims.exp - claims.iat > DAY_S) throw new RefusedError("the invitation lasts too long");
  if (evidence.now >= claims.exp) throw new RefusedError("the invitation has ended; ask for another one");
  if (claims.iat > evidence.now + LEEWAY_S) throw new RefusedError("the invitation is dated in the future");
  if (signer.user_id !== claims.user_id && !signer.roles.includes("operator")) {
    throw new RefusedError(`the invitation is signed by ${signer.user_id}, who is no operator`);
  }
  return { claims, signer };
}
