// What pages do beside what the server wrote: times count down, and the page follows what the services say.
//
// The server says by an event that the page would look different now. The page is then fetched as a document, in which
// no script runs, and what differs is exchanged. No text ever becomes HTML here.

const SECOND = 1000;
const AGAIN = 5 * SECOND;
const live = document.getElementById("live");
const state = document.getElementById("live-state");
const announce = document.getElementById("announce");

function span(seconds) {
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172_800) return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
  return `${Math.floor(seconds / 86_400)} days`;
}

function ago(millis) {
  const seconds = Math.max(0, Math.floor((Date.now() - millis) / SECOND));
  if (seconds < 5) return "just now";
  if (seconds < 172_800) return `${span(seconds)} ago`;
  return moment(millis);
}

/** A moment in ISO order, in the reader's zone, which is named. */
function moment(millis) {
  const parts = { year: "numeric", month: "2-digit", day: "2-digit", hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23", timeZoneName: "short" };
  const found = Object.fromEntries(new Intl.DateTimeFormat("en-GB", parts).formatToParts(millis).map((one) => [one.type, one.value]));
  return `${found.year}-${found.month}-${found.day} ${found.hour}:${found.minute}:${found.second} ${found.timeZoneName}`;
}

/** Write the times below a node as they are now. */
function tick(root) {
  const now = Math.floor(Date.now() / SECOND);
  for (const node of root.querySelectorAll("time[data-until]")) {
    const left = Number(node.dataset.until) - now;
    const text = left <= 0 ? "over" : node.dataset.within === undefined ? `in ${span(left)}` : span(left);
    if (node.textContent !== text) node.textContent = text;
    node.classList.toggle("urgent", left > 0 && left < 60);
  }
  for (const node of root.querySelectorAll("time[data-at]")) {
    const text = node.dataset.exact === undefined ? ago(Number(node.dataset.at)) : moment(Number(node.dataset.at));
    if (node.textContent !== text) node.textContent = text;
  }
}

/** Keep what somebody opened or is writing. Fields without an id, which say what is answered, are always fresh ones. */
function keepInput(fresh) {
  for (const field of fresh.querySelectorAll("details[id], input[id], textarea[id], select[id]")) {
    const same = document.getElementById(field.id);
    if (same === null || !live.contains(same)) continue;
    if (field.localName === "details") field.open = same.open;
    else if (field.type === "checkbox") field.checked = same.checked;
    else field.value = same.value;
  }
}

/** Make `node` look like `fresh`. Parts with an id stay as they are where nothing in them differs. */
function follow(node, fresh) {
  const present = new Map([...node.children].filter((child) => child.id).map((child) => [child.id, child]));
  const wanted = [...fresh.childNodes].map((child) => {
    const old = child.id ? present.get(child.id) : undefined;
    if (child.nodeType === Node.ELEMENT_NODE) keepInput(child);
    if (old === undefined) return document.importNode(child, true);
    if (old.isEqualNode(child)) return old;
    if (old.dataset.parts !== undefined && child.dataset.parts !== undefined) {
      follow(old, child);
      return old;
    }
    return document.importNode(child, true);
  });
  const focused = node.contains(document.activeElement) ? document.activeElement : null;
  const keep = new Set(wanted);
  for (const child of [...node.childNodes]) if (!keep.has(child)) child.remove();
  let at = node.firstChild;
  for (const child of wanted) {
    if (child === at) at = at.nextSibling;
    else node.insertBefore(child, at);
  }
  if (focused !== null && document.activeElement !== focused) sameControl(node, focused)?.focus({ preventScroll: true });
}

const CONTROLS = "a[href], button, input, select, textarea, summary, [tabindex]";

/** The control below a node that is the same as one that was exchanged: by its id, else by what it does and says. */
function sameControl(node, old) {
  if (old.id) return document.getElementById(old.id);
  const described = (one) => [one.localName, one.getAttribute("href"), one.name, one.getAttribute("formaction"), one.textContent].join("\n");
  const alike = [...node.querySelectorAll(CONTROLS)].filter((one) => described(one) === described(old));
  // Nothing but the same will do: Enter must not reach the button of another request.
  const about = (one) => one.closest("form")?.querySelector("input[type=hidden]")?.value ?? one.closest("[id]")?.id;
  return alike.find((one) => about(one) === about(old));
}

class UnavailableError extends Error {}

function fetchDocument() {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("GET", location.href);
    request.responseType = "document";
    request.onload = () => {
      if (request.status === 200 && request.responseURL === location.href.split("#")[0]) {
        resolve(request.response);
        return;
      }
      // The session has ended, and this answer alone says so: it took the cookie along.
      if (new URL(request.responseURL || location.href).pathname === "/sign-in") {
        leaving = true;
        location.replace(request.responseURL);
      }
      reject(request.status >= 500 ? new UnavailableError() : new Error(`${request.status}`));
    };
    request.onerror = () => reject(new UnavailableError());
    request.send();
  });
}

// A page that is being left ends its requests. That is no reason to load it again, which would keep the person on it.
let leaving = false;
window.addEventListener("beforeunload", () => {
  leaving = true;
});

let refreshing = false;
let again = false;

async function refresh() {
  if (refreshing) {
    again = true;
    return;
  }
  refreshing = true;
  try {
    const fresh = await fetchDocument();
    tick(fresh);
    follow(live, fresh.getElementById("live"));
    document.body.dataset.look = fresh.body.dataset.look;
    showAddress();
    announce.textContent = "The page was updated.";
    if (source?.readyState === EventSource.OPEN) setState("Live", "on");
  } catch (error) {
    if (leaving) return;
    // What somebody is writing here stays. What the page shows may be old, and it says so.
    if (error instanceof UnavailableError) {
      setState("Not live", "off");
      setTimeout(refresh, AGAIN);
    } else location.reload();
  } finally {
    refreshing = false;
    if (again) {
      again = false;
      refresh();
    }
  }
}

function setState(text, name) {
  state.textContent = text;
  state.dataset.state = name;
}

let source;

/** Follow the server, from what the page shows now: what changed before is told at once. */
function connect() {
  if (source !== undefined) return;
  const query = new URLSearchParams({ page: location.pathname + location.search, look: document.body.dataset.look });
  const opened = (source = new EventSource(`/live?${query}`));
  opened.addEventListener("open", () => setState("Live", "on"));
  opened.addEventListener("error", () => {
    setState("Not live", "off");
    if (opened.readyState !== EventSource.CLOSED || opened !== source) return;
    // It was answered, and not by a stream: the session or the subject is over, a proxy answers, or there are too many.
    source = undefined;
    refresh();
    setTimeout(() => document.hidden || connect(), AGAIN);
  });
  opened.addEventListener("changed", refresh);
  opened.addEventListener("ended", () => {
    opened.close();
    if (!leaving) location.reload();
  });
}

function disconnect() {
  source?.close();
  source = undefined;
  setState("Not live", "off");
}

// The notice of what was signed is for this once, and no part of an address to share.
const here = new URL(location.href);
if (here.searchParams.has("notice")) {
  here.searchParams.delete("notice");
  history.replaceState(null, "", here);
}

/** Write the page's own address where people are asked to pass it on. */
function showAddress() {
  for (const field of document.querySelectorAll("input.address")) {
    field.value = location.href;
    field.onfocus = () => field.select();
  }
}
showAddress();

if (live !== null) {
  tick(document);
  setInterval(() => tick(document), SECOND);
  if (document.body.dataset.live === "yes") {
    // Browsers open six connections to one HTTP/1.1 server, for all tabs together: hidden ones hold none.
    const matchVisibility = () => (document.hidden ? disconnect() : connect());
    document.addEventListener("visibilitychange", matchVisibility);
    window.addEventListener("pageshow", matchVisibility); // also of a page that the browser kept whole
    window.addEventListener("pagehide", disconnect);
    matchVisibility();
  }
}
