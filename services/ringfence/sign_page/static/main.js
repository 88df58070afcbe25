// The sign page: takes a question, verifies its evidence, shows what was verified, and asks for one touch.

import { RefusedError, freshId } from "./encoding.js";
import { Evidence, verifyInvitation } from "./evidence.js";
import { describe } from "./messages.js";
import { create, sign, usablePasskeys } from "./passkeys.js";
import { checkReturn, questionOf, send } from "./exchange.js";
import { isObject, parseObject } from "./strict_json.js";
import { visible, visibleName } from "./text.js";
import { loadTrust } from "./trust.js";
import {
  button, copyBox, download, element, keyChoice, paragraph, rowList, setBusy, show, showProblem, warningBox,
} from "./view.js";
import { config } from "./config.js";

const STAMPED = ["iss", "aud", "iat", "jti"];
const LAST_KEY = "ringfence.key";
const now = () => Math.floor(Date.now() / 1000);

async function begin() {
  if (window.top !== window.self) throw new RefusedError("this page does not work inside of another one");
  if (location.origin !== config.origin) throw new RefusedError(`this page is for ${config.origin}, not ${location.origin}`);
  if (!window.PublicKeyCredential || !crypto.subtle) throw new RefusedError("this browser knows no passkeys, or the page came without TLS");
  if (!remembers()) throw new RefusedError("this browser keeps no data of this page; allow it, for the version of the trust bundle");
  const fragment = location.hash;
  // The link is of no use twice, and does not belong into the history.
  history.replaceState(null, "", location.pathname);
  if (!fragment) return ask();
  const found = await questionOf(fragment, config);
  if (found === undefined) throw new RefusedError("the link has no question that this page knows");
  await take(found.text, found.source);
}

function remembers() {
  try {
    return localStorage.length >= 0;
  } catch {
    return false;
  }
}

function ask() {
  const area = element("textarea", { id: "question", rows: "8", spellcheck: "false", autocomplete: "off" });
  show(
    "Sign with a passkey",
    paragraph("Open the link that the command line, the console or an operator gave you. Or paste a question here."),
    element("label", { for: "question" }, "Question"),
    area,
    element("div", { class: "buttons" }, button("Look at it", () => guarded(() => take(area.value)))),
  );
}

async function take(text, source) {
  const question = parseObject(text);
  const unknown = Object.keys(question).find((one) => !["user", "message", "invitation", "evidence", "return_to"].includes(one));
  if (unknown !== undefined) throw new RefusedError(`the question has a member that this page does not know: ${visibleName(unknown)}`);
  if (!isObject(question.evidence)) throw new RefusedError("the question has no evidence");
  const trust = await loadTrust(question.evidence.trust, config, now(), localStorage);
  const returnTo = question.return_to ?? source;
  if (returnTo !== undefined) {
    // An origin of a console counts if the root names it, and this page was built for it.
    const consoles = trust.origins("session").filter((origin) => config.sessionOrigins.includes(origin));
    checkReturn(returnTo, consoles);
    if (source !== undefined && returnTo !== source) throw new RefusedError("the answer is to go elsewhere than the question came from");
  }
  const evidence = new Evidence(trust, config, now(), localStorage);
  await evidence.addRecords(question.evidence.records ?? []);
  if (question.invitation !== undefined) return enrol(question, evidence, returnTo);
  if (!isObject(question.message) || !isObject(question.message.claims)) throw new RefusedError("the question has no message");
  return confirm(question, evidence, returnTo);
}

// --- signing ---

async function confirm(question, evidence, returnTo) {
  const { typ, claims } = question.message;
  const { state } = evidence.record("user", question.user);
  if (state.status !== "active") throw new RefusedError(`${visibleName(state.user_id)} is disabled, and signs nothing`);
  const stamped = STAMPED.find((one) => one in claims);
  if (stamped !== undefined) throw new RefusedError(`the question says ${stamped}, which is for this page to say`);
  const described = await describe(typ, claims, evidence, question.evidence);
  const keys = usablePasskeys(state, config, now());
  if (keys.length === 0) {
    throw new RefusedError(`${visibleName(state.user_id)} has no passkey of this page; ask an operator for an invitation`);
  }
  const choice = keyChoice(keys, keys.map(keyLabel), keys.findIndex((key) => key.kid === localStorage.getItem(LAST_KEY)));
  const whole = () => ({
    iss: `spiffe://${config.trustDomain}/user/${state.user_id}`, aud: config.trustDomain, iat: now(), jti: freshId(), ...claims,
  });
  const signIt = () => guarded(async () => {
    const key = choice.value();
    // Described again: the page may have stood open for long, and its time may be over.
    evidence.now = now();
    await describe(typ, claims, evidence, question.evidence);
    const jws = await sign(typ, whole(), key, config);
    localStorage.setItem(LAST_KEY, key.kid);
    await done("Signed", { answer: jws }, jws, returnTo, "answer.jws");
  });
  const refuse = () => guarded(async () => {
    const next = returnTo === undefined ? undefined : await send(returnTo, { refused: true });
    show("Nothing was signed", paragraph("You can close this page."));
    goOn(next);
  });
  show(
    described.title,
    paragraph(`You are ${visibleName(state.user_id)} (${visible(state.name)}) in ${config.trustDomain}.`, "quiet"),
    warningBox(described.warnings),
    rowList(described.rows),
    choice.node,
    element("div", { class: "buttons" },
      button(described.action, signIt, described.gives ? "primary" : "primary stop"),
      button("Sign nothing", refuse, "secondary")),
    details("Exactly what is signed", typ, claims),
  );
}

function details(title, typ, claims) {
  const text = JSON.stringify({ typ: `ringfence.${typ}+jwt`, ...claims }, null, 2);
  return element("details", {},
    element("summary", {}, title),
    paragraph("With your id, this trust domain, the time and a fresh random id, which this page adds.", "quiet"),
    element("pre", { dir: "ltr", tabindex: "0" }, text.split("\n").map(visibleName).join("\n")));
}

function keyLabel(key) {
  const kind = key.backup_eligible ? "a passkey that is synchronised" : "a passkey of one device";
  return `${kind}, ${key.kid.slice(0, 8)}`;
}

// --- enrolment ---

async function enrol(question, evidence, returnTo) {
  const { claims, signer } = await verifyInvitation(evidence, question.invitation);
  const user = claims.user_id;
  const state = evidence.find("user", user)?.state;
  if (state !== undefined && state.status !== "active") throw new RefusedError(`${visibleName(user)} is disabled`);
  const who = signer.user_id === user ? "yourself" : `${visibleName(signer.user_id)} (${visible(signer.name)}), an operator`;
  const make = () => guarded(async () => {
    const existing = state === undefined ? [] : usablePasskeys(state, config, now());
    const made = await create(user, state?.name ?? user, existing, config);
    show(
      "Once more, to prove that it works",
      paragraph("The new passkey signs that it is yours. Nothing is added until an operator, or your key file, signs too."),
      element("div", { class: "buttons" }, button("Prove it", () => guarded(() => prove(question, claims, made, returnTo)))),
    );
  });
  show(
    `Add a passkey for ${visibleName(user)}`,
    paragraph(`You were invited by ${who}. Go on only if you expected this.`),
    rowList([
      { label: "Whose key", text: visibleName(user) },
      { label: "Trust domain", text: config.trustDomain },
      { label: "Page", text: config.origin, style: "code" },
      { label: "Ends", text: new Date(claims.exp * 1000).toLocaleString() },
    ]),
    element("div", { class: "buttons" }, button("Make a passkey", make)),
  );
}

async function prove(question, invitation, made, returnTo) {
  const { kid, ...key } = made;
  const claims = {
    iss: `spiffe://${config.trustDomain}/user/${invitation.user_id}`, aud: config.trustDomain, iat: now(), jti: freshId(),
    exp: invitation.exp, user_id: invitation.user_id, jwk: made.jwk, invitation: invitation.jti,
  };
  const possession = await sign("key.possession", claims, made, config);
  const offer = { user: invitation.user_id, invitation: question.invitation, ...key, possession };
  const text = JSON.stringify(offer, null, 1);
  await done("The passkey is ready", { offer }, text, returnTo, `passkey-${invitation.user_id}.json`,
    [
      paragraph("It counts once an operator, or your own key file, has added it: within ten minutes."),
      rowList([{ label: "Its fingerprint, to compare", text: kid, style: "code" }]),
    ],
    button("Prove it again", () => guarded(() => prove(question, invitation, made, undefined)), "secondary"));
}

// --- the end ---

async function done(title, answer, text, returnTo, filename, more = [], again = undefined) {
  let sent = false;
  let next;
  let problem;
  if (returnTo !== undefined) {
    try {
      next = await send(returnTo, answer);
      sent = true;
    } catch (error) {
      if (!(error instanceof RefusedError)) throw error;
      problem = error.message;
    }
  }
  show(
    title,
    ...more,
    sent
      ? paragraph("It was handed to the program that asked. You can close this page.")
      : paragraph("Give this text to the program or the person who asked. It is no secret, and good for ten minutes only."),
    sent ? undefined : copyBox("Answer", text),
    element("div", { class: "buttons" }, sent ? undefined : download("Save as a file", filename, text), again),
  );
  if (problem !== undefined) showProblem(`It could not be handed over: ${visible(problem)}`);
  goOn(next);
}

/** Lead the person back to the console that asked. */
function goOn(next) {
  if (next !== undefined) location.replace(next);
}

async function guarded(work) {
  document.getElementById("problem")?.remove();
  setBusy(true);
  try {
    await work();
  } catch (error) {
    showProblem(error instanceof RefusedError ? upper(error.message) : "Something went wrong in this page. Nothing was signed.");
    if (!(error instanceof RefusedError)) console.error(error);
  } finally {
    setBusy(false);
  }
}

const upper = (text) => text.charAt(0).toUpperCase() + text.slice(1);

document.getElementById("domain").textContent = config.trustDomain;
document.getElementById("root").textContent = config.trustRoot;
begin().catch((error) => {
  show("This cannot be signed here", paragraph("Nothing was signed, and nothing of it is shown, because it did not verify."));
  showProblem(error instanceof RefusedError ? upper(error.message) : "Something went wrong in this page.");
  if (!(error instanceof RefusedError)) console.error(error);
});
window.addEventListener("hashchange", () => location.reload());
