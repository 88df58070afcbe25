// What each message means, in plain words: one entry for each that a passkey may sign on this page.
//
// An entry names every member that its claims may have, so that nothing is signed that was not shown; and describes
// the claims, by verified evidence, as rows of label and text. All text goes through `visible` or `visibleName`.

import { RefusedError, digest, messageId } from "./encoding.js";
import { isTime, parse } from "./jws.js";
import { changesOf, proposedCommand, sorted } from "./proposals.js";
import { duration, moment, visibleLines, visibleName, visibleResource } from "./text.js";

const COMMON = ["exp"];

/** Describe a message. Returns `{title, action, gives, rows, warnings}`; throws RefusedError. */
export async function describe(typ, claims, evidence, extra) {
  const entry = MESSAGES[typ];
  if (entry === undefined) throw new RefusedError(`no passkey signs ${visibleName(String(typ).slice(0, 60))} on this page`);
  for (const name of Object.keys(claims)) {
    if (!entry.members.includes(name) && !COMMON.includes(name)) {
      throw new RefusedError(`this page does not know the member ${visibleName(name.slice(0, 60))}, and cannot show it`);
    }
  }
  if (entry.expires !== isTime(claims.exp)) throw new RefusedError("its end (exp) is missing, or there may be none");
  if (entry.expires && claims.exp <= evidence.now) throw new RefusedError("its time is over; ask anew");
  evidence.used.clear();
  const described = { warnings: [], gives: true, ...(await entry.describe(claims, evidence, extra)) };
  const used = [...evidence.used.values()];
  const outdated = used.filter((record) => record.revision < record.seen).map((record) => (
    `the record of ${record.typ} ${name(record.id)} has revision ${record.revision}; this browser has seen revision ${record.seen}`
  ));
  // What takes something away is signed all the same: nothing may stand in its way.
  if (outdated.length > 0 && described.gives) throw new RefusedError(`${outdated[0]}: what it shows is outdated; ask anew`);
  described.warnings = [...outdated.map((one) => `What you see is outdated: ${one}.`), ...described.warnings];
  if (used.length > 0) described.rows.push(row("As of", used.map(asOf).join("\n")));
  if (entry.expires) described.rows.push(row("Counts until", moment(claims.exp)));
  return described;
}

/** How old a state is that the page shows as the present one: only a registry knows whether there is a later one. */
const asOf = ({ typ, id, revision, at }) => `${typ} ${name(id)}: revision ${revision}, signed ${moment(at)}`;

const row = (label, text, style = "") => ({ label, text, style });
const name = (text) => visibleName(str(text));
const resource = (text) => visibleResource(str(text));
const prose = (text) => visibleLines(str(text));

function str(value) {
  if (typeof value !== "string") throw new RefusedError("a text is missing, or is no text");
  return value;
}

function int(value) {
  if (!isTime(value)) throw new RefusedError("a number is missing, or is none");
  return value;
}

function known(members, value) {
  const unknown = Object.keys(value).find((member) => !members.includes(member));
  if (unknown !== undefined) throw new RefusedError(`this page does not know ${visibleName(unknown)}, and cannot show it`);
  return value;
}

/** `{"name": "text"}` and so on: what may be done, a line for each resource. */
function scopeRows(scope, label = "May") {
  if (!Array.isArray(scope)) throw new RefusedError("a scope is no list");
  if (scope.length === 0) return [row(label, "nothing")];
  const lines = scope.map((permission) => {
    known(["target", "verbs", "resources"], permission);
    const verbs = permission.verbs.map(name).join(", ");
    return `${verbs}  on  ${permission.resources.map(resource).join(", ")}  at  ${name(permission.target)}`;
  });
  return [row(label, lines.join("\n"), "code")];
}

const deliveredTo = (delivery) => {
  if (delivery === "agent") return "the agent itself";
  if (delivery === "gateway") return "the gateway, which uses it for the agent";
  throw new RefusedError("it is delivered to nobody that this page knows");
};

const about = (id, description) => `${name(id)} — ${prose(description)}`;
const comment = (claims) => (claims.comment === undefined ? [] : [row("Your comment", prose(claims.comment), "quote")]);
const reason = (claims) => [row("Your reason", prose(claims.reason), "quote")];

function verdict(claims) {
  if (claims.verdict === "approved") return true;
  if (claims.verdict === "denied") return false;
  throw new RefusedError("its verdict is neither yes nor no");
}

/** Who acts, what they want (`wanted`), and the task that it is for: what decides comes first. */
function groundRows(ground, wanted) {
  const { agent, task, target } = ground;
  const rows = [
    row("Agent", about(agent.agent_id, agent.description)),
    ...wanted,
    row("Target", about(target.target_id, target.description)),
    row("Task", prose(task.purpose), "quote"),
    row("On behalf of", name(task.on_behalf_of)),
  ];
  if (task.act?.length > 1) rows.push(row("Handed on by", task.act.slice(1).map(name).join(", then ")));
  rows.push(row("Its sponsor", name(agent.sponsor)));
  return rows;
}

async function describeRequest(compact, evidence, revisions, ttl) {
  const request = await evidence.agentRequest(compact);
  const { claims, instance } = request;
  known(
    ["iss", "aud", "iat", "jti", "exp", "nbf", "task_id", "scope", "ttl_s", "delivery", "reason", "reply_key", "break_glass",
     "process", "enrolment"],
    claims,
  );
  const targets = new Set(claims.scope.map((permission) => permission.target));
  if (targets.size !== 1) throw new RefusedError("the request is for more than one target");
  const agentId = evidence.subject("agent", claims.iss);
  const ground = evidence.ground(agentId, claims.task_id, [...targets][0], revisions);
  const rows = groundRows(ground, [
    ...scopeRows(claims.scope, "Asks to"),
    row("Credential for", duration(int(ttl))),
    row("Its reason, in its own words", prose(claims.reason), "quote"),
  ]);
  if (instance) rows.push(row("Running as", `${prose(instance.subject)} of ${prose(instance.issuer)}`));
  return { request, ground, rows };
}

async function approval(claims, evidence, extra) {
  const asked = await evidence.trust.signedBy(["policy"], "approval.request", extra.question, "policy's question");
  const yes = verdict(claims);
  const { request, ground, rows } = await describeRequest(claims.request, evidence, claims.revisions, claims.ttl_s);
  const same = (one, other) => JSON.stringify(sorted(one)) === JSON.stringify(sorted(other));
  if (
    asked.request !== claims.request || asked.request_id !== request.id || claims.request_id !== request.id ||
    claims.request_digest !== request.digest || asked.ttl_s !== claims.ttl_s ||
    asked.delivery !== claims.delivery || !same(asked.revisions, claims.revisions)
  ) {
    throw new RefusedError("the answer is not to the question that policy signed");
  }
  if (claims.ttl_s > request.claims.ttl_s || claims.delivery !== (request.claims.delivery ?? "agent")) {
    throw new RefusedError("the terms go beyond what the agent asked for");
  }
  if (evidence.now >= asked.expires_at || claims.exp > asked.expires_at) {
    throw new RefusedError("policy no longer waits for this answer, or not for so long");
  }
  rows.push(
    row("Delivered to", deliveredTo(claims.delivery)),
    row("Needs the word of", asked.required.map(name).join(" and ")),
    ...(asked.reasons ?? []).map((one) => row("Policy says", prose(one.message))),
    ...comment(claims),
    row("Request", `${request.id}\nSHA-256 ${request.digest}`, "code"),
  );
  const warnings = request.claims.break_glass
    ? ["Break glass: two operators are asked to allow, once, what policy denies."]
    : [];
  const title = `${yes ? "Approve" : "Deny"} a credential for ${name(ground.agent.agent_id)}`;
  return { title, action: yes ? "Approve" : "Deny", gives: yes, rows, warnings };
}

async function actionApproval(claims, evidence) {
  const asked = await evidence.trust.signedBy(["gateway"], "action.request", claims.request, "the gateway's question");
  known(
    ["iss", "aud", "iat", "jti", "exp", "action_id", "agent_id", "task_id", "lease_id", "target_id", "verb", "resource",
     "method", "url", "body_digest", "body_bytes", "headers_digest", "headers", "required", "revisions"],
    asked,
  );
  const yes = verdict(claims);
  if (claims.request_digest !== (await digest(claims.request)) || claims.agent_id !== asked.agent_id) {
    throw new RefusedError("the answer is not to the question that the gateway signed");
  }
  if (evidence.now >= asked.exp || claims.exp > asked.exp) throw new RefusedError("the gateway no longer waits");
  const ground = evidence.ground(asked.agent_id, asked.task_id, asked.target_id, asked.revisions);
  str(asked.headers_digest);
  if (!Array.isArray(asked.headers)) throw new RefusedError("the headers of the question are no list");
  const headers = asked.headers.map((one) => `${name(one.name)}: ${one.value === undefined ? "(not shown)" : name(one.value)}`);
  const rows = [
    ...groundRows(ground, [
      row("Action", `${name(asked.verb)}  on  ${resource(asked.resource)}`, "code"),
      row("As a request", `${name(asked.method)} ${name(asked.url)}`, "code"),
      row("Body", asked.body_bytes ? `${int(asked.body_bytes)} bytes, SHA-256 ${name(asked.body_digest)}` : "none", "code"),
      row("Headers", headers.join("\n") || "none", "code"),
    ]),
    row("Needs the word of", name(asked.required)),
    row("Held by", name(asked.iss)),
    ...comment(claims),
    row("Question", `${await messageId(asked.iss, asked.jti)}\nSHA-256 ${claims.request_digest}`, "code"),
  ];
  const title = `${yes ? "Approve" : "Deny"} one action of ${name(asked.agent_id)}`;
  return { title, action: yes ? "Approve once" : "Deny", gives: yes, rows };
}

async function grant(claims, evidence) {
  const targets = new Set(claims.scope.map((permission) => permission.target));
  if (targets.size !== 1) throw new RefusedError("a grant is for one target");
  const ground = evidence.ground(claims.agent_id, claims.task_id, [...targets][0], claims.revisions);
  const count = int(claims.count);
  return {
    title: `Approve ahead for ${name(claims.agent_id)}`,
    action: "Approve ahead",
    rows: [
      ...groundRows(ground, [
        ...scopeRows(claims.scope, "May have"),
        row("Credentials", `${count}, each for ${duration(int(claims.ttl_s))} at most`),
      ]),
      row("Delivered to", deliveredTo(claims.delivery)),
      ...comment(claims),
    ],
    warnings: [`You are not asked again: ${count === 1 ? "one credential is" : `${count} credentials are`} issued on this.`],
  };
}

function grantWithdraw(claims) {
  return {
    title: "Take back an approval given ahead",
    action: "Take back",
    gives: false,
    rows: [row("Grant", name(claims.grant_id), "code"), ...reason(claims)],
    warnings: ["What was issued on it goes on to its end."],
  };
}

async function review(claims, evidence, extra) {
  const decision = await evidence.trust.signedBy(["policy"], "credential.decision", extra.decision, "the decision");
  if (
    claims.decision_digest !== (await digest(extra.decision)) || decision.request_id !== claims.request_id ||
    decision.outcome !== "allowed"
  ) {
    throw new RefusedError("the review is of another decision than the one that came with it");
  }
  const request = parse(decision.request, "the request");
  if (evidence.subject("agent", request.claims.iss) !== claims.agent_id || !request.claims.break_glass) {
    throw new RefusedError("the decision is no use of break glass by that agent");
  }
  return {
    title: `Review a use of break glass by ${name(claims.agent_id)}`,
    action: "Sign the review",
    gives: false,
    rows: [
      row("Agent", name(claims.agent_id)),
      ...scopeRows(request.claims.scope, "Was allowed to"),
      row("Its reason, in its own words", prose(request.claims.reason), "quote"),
      row("At", moment(decision.iat)),
      ...(decision.reasons ?? []).map((one) => row("Against", prose(one.message))),
      row("Your review", prose(claims.note), "quote"),
      row("Request", `${name(claims.request_id)}\nSHA-256 of the decision ${name(claims.decision_digest)}`, "code"),
    ],
  };
}

const SELECTED = {
  agent_id: "all leases of agent", task_id: "all leases of task", sponsor: "all leases of the agents of sponsor",
  target_id: "all leases for target", user_id: "all leases on behalf of", all: "every lease of every agent",
};

async function revocation(claims, evidence, extra) {
  let what = `lease ${name(claims.lease_id ?? "")}`;
  if (claims.kind !== "revocation") throw new RefusedError("it is no revocation by a person");
  if (claims.selector !== undefined) {
    const chosen = Object.entries(known(Object.keys(SELECTED), claims.selector)).filter(([, value]) => value !== false);
    if (chosen.length !== 1 || claims.lease_id !== undefined) throw new RefusedError("a revocation names one thing");
    const [[key, value]] = chosen;
    what = key === "all" ? SELECTED.all : `${SELECTED[key]} ${name(value)}`;
  }
  const rows = claims.selector === undefined
    ? await leaseRows(str(claims.lease_id), evidence, extra.lease)
    : taskRows(evidence.find("task", claims.selector.task_id)?.state);
  return {
    title: "Revoke",
    action: "Revoke",
    gives: false,
    rows: [row("Ends", what), ...rows, ...reason(claims)],
    warnings: ["What it covers is cut at once. Agents may ask again with new requests."],
  };
}

/** What a lease is for, where its record came with the question: by the issuer, or by a revoker later. */
async function leaseRows(leaseId, evidence, compact) {
  if (compact === undefined) return [];
  const lease = await evidence.trust.signedBy(["issuer", "revoker"], "lease", compact, "the lease");
  if (lease.lease_id !== leaseId) throw new RefusedError("it is another lease than the one that came with it");
  return [
    row("Agent", name(lease.agent_id)),
    row("On behalf of", name(lease.on_behalf_of)),
    ...scopeRows(lease.scope, "Allows"),
    row("Ends by itself", moment(int(lease.deadline))),
  ];
}

function endKey(claims, evidence) {
  const { state } = evidence.record("user", claims.user_id);
  const key = state.keys.find((one) => one.kid === claims.kid);
  if (key === undefined) throw new RefusedError(`${name(state.user_id)} has no such key`);
  const warnings = ["It signs nothing any more. This cannot be undone."];
  if (claims.compromised) {
    warnings.push(
      "If you are an operator: keys of other people and of agents that it gave since then, and keys that these gave, " +
      "count no more. This cannot be undone either.",
    );
  }
  return {
    title: `End a key of ${name(claims.user_id)}`,
    action: "End the key",
    gives: false,
    rows: [
      row("Key", `${key.use === "webauthn" ? "passkey" : "key file"} ${name(claims.kid)}`, "code"),
      row("May be in other hands", claims.compromised ? "yes: keys that it added end too" : "no"),
      ...(claims.compromised || claims.since_ms !== undefined ? [row("Since", moment(Math.floor(int(claims.since_ms) / 1000)))] : []),
      ...(claims.holds ?? []).map((one) => row("Holds", `${one.kind} ${name(one.id)}: ${one.parts.map(name).join(", ")}`)),
      ...reason(claims),
    ],
    warnings,
  };
}

function agentRows(agent) {
  return [
    row("Agent", about(agent.agent_id, agent.description)),
    row("Its sponsor", name(agent.sponsor)),
    row("Its state", name(agent.status)),
  ];
}

const agentCommand = (title, action, gives, warnings) => (claims, evidence) => {
  const { state } = evidence.record("agent", claims.agent_id);
  return {
    title: `${title} ${name(claims.agent_id)}`, action, gives, warnings,
    rows: [...agentRows(state), ...reason(claims)],
  };
};

/** The revision that the command replaces: if it is another one by then, the registry refuses to widen. */
function seenRows(claims) {
  if (claims.revision === undefined) return [];
  if (!Number.isSafeInteger(claims.revision) || claims.revision < 0) throw new RefusedError("the revision is no number");
  return [row("Unless it has changed since", `revision ${claims.revision}, renewals of keys not counted`)];
}

function setCeiling(claims, evidence) {
  const { state, revision } = evidence.record("agent", claims.agent_id);
  return {
    title: `Replace the ceiling of ${name(claims.agent_id)}`,
    action: "Replace the ceiling",
    rows: [...agentRows(state), ...scopeRows(state.ceiling, `May hold, by revision ${revision}`), ...scopeRows(claims.ceiling, "May hold then"), ...limitRows(state.limits, "Limits of a task now"), ...limitRows(claims.limits, "Limits of a task then"), ...seenRows(claims)],
    warnings: ["Leases beyond the new ceiling end."],
  };
}

function transfer(claims, evidence) {
  const { state } = evidence.record("agent", claims.agent_id);
  const rows = [...agentRows(state), row("New sponsor", name(claims.sponsor))];
  const warnings = [];
  if (claims.without_consent) warnings.push(`${name(claims.sponsor)} was not asked.`);
  if (claims.consent !== undefined) rows.push(row("Consent", "of the new sponsor, as it came; the registry verifies it"));
  return { title: `Transfer ${name(claims.agent_id)}`, action: "Transfer", rows, warnings };
}

function transferConsent(claims, evidence) {
  const { state, revision } = evidence.record("agent", claims.agent_id);
  if (claims.revision !== revision || claims.from_sponsor !== state.sponsor) {
    throw new RefusedError("the agent changed since this was asked");
  }
  return {
    title: `Take over ${name(claims.agent_id)}`,
    action: "Take over",
    rows: [...agentRows(state), ...scopeRows(state.ceiling, "May hold")],
    warnings: ["You become accountable for what it does."],
  };
}

/** The limits of what a task uses of language models; "none" says that there are none. */
function limitRows(limits, title) {
  if (limits === undefined) return [row(title, "none")];
  known(["tokens", "requests"], limits);
  return [row(title, Object.entries(limits).map(([what, most]) => `${int(most)} ${what}`).join(", "))];
}

function termsRows(terms, evidence) {
  known(["agent_id", "purpose", "scope", "not_after", "limits"], terms);
  const { state } = evidence.record("agent", terms.agent_id);
  return [
    ...agentRows(state),
    row("Purpose", prose(terms.purpose), "quote"),
    ...scopeRows(terms.scope, "The task allows"),
    ...limitRows(terms.limits, "Limits of models"),
    row("Ends", moment(int(terms.not_after))),
  ];
}

function taskAssign(claims, evidence) {
  const rows = [...termsRows(claims.terms, evidence), row("On behalf of", name(claims.on_behalf_of))];
  if (claims.consent ?? claims.id_token) rows.push(row("Consent", "of that user, as it came; the registry verifies it"));
  return { title: `Assign a task to ${name(claims.terms.agent_id)}`, action: "Assign", rows };
}

function taskConsent(claims, evidence) {
  return {
    title: `Consent to a task of ${name(claims.terms.agent_id)} on your behalf`,
    action: "Consent",
    rows: termsRows(claims.terms, evidence),
    warnings: ["It acts with your rights, within these limits."],
  };
}

/** Whose task it is, and what for; nothing where its record did not come. */
const taskRows = (task) => (task === undefined ? [] : [
  row("Agent", name(task.agent_id)),
  row("On behalf of", name(task.on_behalf_of)),
  row("Purpose", prose(task.purpose), "quote"),
]);

function taskEnd(claims, evidence) {
  const { state } = evidence.record("task", claims.task_id);
  return {
    title: `End a task of ${name(state.agent_id)}`,
    action: "End the task",
    gives: false,
    rows: [...taskRows(state), ...reason(claims)],
    warnings: ["Its leases end."],
  };
}

// --- proposals ---

const REPORT_S = 3600;
const SHORT = 12;

const MAX_SECONDED = 100;
const LISTED = ["user.set", "user.add-key"];

/** The proposed commands that came with the question, which have the digests `wanted`, in that order. */
async function proposalsOf(extra, evidence, wanted) {
  if (!Array.isArray(extra.commands) || extra.commands.length !== wanted.length) {
    throw new RefusedError("the proposed command did not come with it");
  }
  const found = [];
  for (const compact of extra.commands) found.push(await proposedCommand(compact, evidence));
  if (found.some((one, at) => one.digest !== wanted[at])) {
    throw new RefusedError("it is another proposal than the one that came with it");
  }
  return found;
}

const asText = (value) => (value === undefined ? "none" : JSON.stringify(value, null, 1).split("\n").map(visibleName).join("\n"));

/** What a proposal changes, by the records that were verified, as `ringfence proposal show` has it. */
async function proposalRows(found, evidence, extra) {
  const rows = [
    row("Proposal", found.digest.slice(0, SHORT), "code"),
    row("Command", `${found.typ} of ${found.kind} ${name(found.id)}`),
    row("Proposed by", name(found.author)),
    row("Proposed at", moment(int(found.claims.iat))),
  ];
  if (found.claims.reason !== undefined) rows.push(row("Their reason", prose(found.claims.reason), "quote"));
  if (found.now === undefined) rows.push(row("Now", `there is no ${found.kind} ${name(found.id)}`));
  for (const [member, before, after] of changesOf(found.now, found.then)) {
    rows.push(row(`${name(member)} now`, asText(before), "code"), row(`${name(member)} then`, asText(after), "code"));
  }
  if (found.claims.ceiling !== undefined) rows.push(...(await ceilingRows(found, evidence, extra)));
  return rows;
}

/** The whole ceiling: what is new in it, what was used, and what speaks against it, as policy signed that. */
async function ceilingRows(found, evidence, extra) {
  const report = extra.report === undefined ? {} : await ceilingReport(found, evidence, extra.report);
  const held = new Set((found.now?.ceiling ?? []).flatMap(rightsOf));
  const days = report.used && new Map(report.used.map((one) => [`${one.target} ${one.verb}`, one.days]));
  const lines = found.claims.ceiling.flatMap((permission) => permission.verbs.map((verb) => {
    const one = { ...permission, verbs: [verb] };
    const text = `${name(verb)}  on  ${permission.resources.map(resource).join(", ")}  at  ${name(permission.target)}`;
    const used = days?.get(`${permission.target} ${verb}`);
    if (!rightsOf(one).every((right) => held.has(right))) return `${text}  (new, or written anew)`;
    if (days === undefined || days === null) return `${text}  (its use is not known)`;
    return `${text}  (${used === undefined ? "not used in 30 days" : `used on ${int(used)} of 30 days`})`;
  }));
  const combinations = report.combinations ?? ["not known: policy does not say"];
  const rows = [row("Whole ceiling then", lines.join("\n") || "nothing", "code")];
  if (combinations.length > 0) rows.push(row("Forbidden combinations", combinations.map(prose).join("\n")));
  if (report.givers?.length > 0) {
    const who = report.people.map(name).join(" and ");
    rows.push(row("One person", `${who}: all rights by the word of ${report.givers.map(name).join(", ")} alone`));
  }
  return rows;
}

const rightsOf = ({ target, verbs, resources }) =>
  verbs.flatMap((verb) => resources.map((one) => JSON.stringify([target, verb, one])));

async function ceilingReport(found, evidence, compact) {
  const report = await evidence.trust.signedBy(["policy"], "ceiling.report", compact, "policy's report");
  const people = [found.author, found.then.sponsor, ...(found.now === undefined ? [] : [found.now.sponsor])];
  if (
    report.agent_id !== found.id || evidence.now - report.iat > REPORT_S ||
    JSON.stringify(sorted(report.ceiling)) !== JSON.stringify(sorted(found.claims.ceiling)) ||
    !people.every((one) => report.people.includes(one))
  ) {
    throw new RefusedError("policy's report is of another ceiling, or too old; go back and open it again");
  }
  return report;
}

/** One second person's signature of one change, or of several users and keys: each is shown, by its verified record. */
async function second(claims, evidence, extra) {
  const named = claims.commands;
  if (!Array.isArray(named) || named.length < 1 || named.length > MAX_SECONDED) {
    throw new RefusedError(`it seconds no change, or more than ${MAX_SECONDED}`);
  }
  named.forEach((said) => known(["author", "command", "proposal", "revision"], said));
  const found = await proposalsOf(extra, evidence, named.map((said) => said.proposal));
  if (found.length > 1 && found.some((one) => !LISTED.includes(one.typ))) {
    throw new RefusedError("only users and keys are seconded in a list; second each other change alone");
  }
  if (new Set(found.map((one) => `${one.kind} ${one.id}`)).size < found.length) {
    throw new RefusedError("the list names a subject twice; second one of both alone");
  }
  const rows = [];
  for (const [at, one] of found.entries()) {
    const said = named[at];
    if (said.author !== one.claims.iss || said.command !== one.claims.jti) {
      throw new RefusedError("it is another proposal than the one that came with it");
    }
    if (said.revision !== one.revision) {
      throw new RefusedError(`the record of ${one.kind} ${name(one.id)} has revision ${one.revision}, and another one is signed`);
    }
    rows.push(...(await proposalRows(one, evidence, extra)), row("Unless it has changed since", `revision ${said.revision}`));
  }
  const [{ kind, id }] = found;
  return {
    title: found.length === 1 ? `Second a change of ${kind} ${name(id)}` : `Second ${found.length} changes of users and keys`,
    action: found.length === 1 ? "Second it" : `Second all ${found.length}`,
    rows,
    warnings: [found.length === 1 ? "It takes effect at once, by its author and you." : "They take effect at once, by their authors and you: all, or none."],
  };
}

async function withdraw(claims, evidence, extra) {
  const [found] = await proposalsOf(extra, evidence, [claims.proposal]);
  return {
    title: `Withdraw a change of ${found.kind} ${name(found.id)}`,
    action: "Withdraw it",
    gives: false,
    rows: await proposalRows(found, evidence, extra),
    warnings: ["Nobody can second it any more."],
  };
}

const entry = (describe, members, expires = true) => ({ describe, members, expires });
const ANSWER = ["verdict", "request", "request_id", "request_digest", "ttl_s", "delivery", "revisions", "comment"];
const GRANT = ["agent_id", "task_id", "scope", "count", "ttl_s", "delivery", "revisions", "comment"];

const MESSAGES = {
  "approval": entry(approval, ANSWER),
  "action.approval": entry(actionApproval, ["verdict", "agent_id", "request", "request_digest", "comment"]),
  "grant": entry(grant, GRANT),
  "grant.withdraw": entry(grantWithdraw, ["grant_id", "reason"]),
  "break_glass.review": entry(review, ["request_id", "decision_digest", "agent_id", "note"], false),
  "revocation.request": entry(revocation, ["kind", "lease_id", "selector", "reason"], false),
  "user.end-key": entry(endKey, ["user_id", "kid", "reason", "compromised", "since_ms", "holds"]),
  "command.second": entry(second, ["commands"]),
  "command.withdraw": entry(withdraw, ["proposal"]),
  "agent.suspend": entry(
    agentCommand("Suspend", "Suspend", false, ["Its leases end, and nothing is issued."]), ["agent_id", "reason"],
  ),
  "agent.resume": entry(agentCommand("Resume", "Resume", true, []), ["agent_id", "reason"]),
  "agent.set-ceiling": entry(setCeiling, ["agent_id", "ceiling", "limits", "revision"]),
  "agent.transfer": entry(transfer, ["agent_id", "sponsor", "consent", "without_consent"]),
  "agent.transfer-consent": entry(transferConsent, ["agent_id", "from_sponsor", "revision"]),
  "task.assign": entry(taskAssign, ["terms", "on_behalf_of", "consent", "id_token"]),
  "task.consent": entry(taskConsent, ["terms"]),
  "task.end": entry(taskEnd, ["task_id", "reason"]),
};

/** The members that this page shows, by the messages that it signs. A test compares them with what services read. */
export const MEMBERS = Object.fromEntries(Object.entries(MESSAGES).map(([typ, { members }]) => [typ, members]));
