// What pages do beside what the server wrote: times count down, and the page follows what the services say.
//
// The server says by an event that the page would look different now. The page is then fetched as a document, in which
// no script runs, and what differs is exchanged. No text ever becomes HTML here.

const SECOND = 1000;
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
  return new Date(millis).toLocaleString();
}

/** Write the times below a node as they are now. */
function tick(root) {
  const now = Math.floor(Date.now() / SECOND);
  for (const node of root.querySelectorAll("time[data-until]")) {
    const left = Number(node.dataset.until) - now;
    const text = left > 0 ? `in ${span(left)}` : "over";
    if (node.textContent !== text) node.textContent = text;
    node.classList.toggle("urgent", left > 0 && left < 60);
  }
  for (const node of root.querySelectorAll("time[data-at]")) {
    const text = node.dataset.exact === undefined ? ago(Number(node.dataset.at)) : new Date(Number(node.dataset.at)).toLocaleString();
    if (node.textContent !== text) node.textContent = text;
  }
}

/** Make `node` look like `fresh`. Parts with an id stay as they are where nothing in them differs. */
function follow(node, fresh) {
  const present = new Map([...node.children].filter((child) => child.id).map((child) => [child.id, child]));
  const wanted = [...fresh.childNodes].map((child) => {
    const old = child.id ? present.get(child.id) : undefined;
    if (old === undefined) return document.importNode(child, true);
    for (const details of child.querySelectorAll("details[id]")) {
      const same = document.getElementById(details.id);
      if (same && old.contains(same)) details.open = same.open;
    }
    if (old.isEqualNode(child)) return old;
    if (old.dataset.parts !== undefined && child.dataset.parts !== undefined) {
      follow(old, child);
      return old;
    }
    return document.importNode(child, true);
  });
  const focused = document.activeElement?.id;
  const keep = new Set(wanted);
  for (const child of [...node.childNodes]) if (!keep.has(child)) child.remove();
  let at = node.firstChild;
  for (const child of wanted) {
    if (child === at) at = at.nextSibling;
    else node.insertBefore(child, at);
  }
  if (focused && document.activeElement?.id !== focused) document.getElementById(focused)?.focus();
}

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
      reject(new Error(`${request.status}`));
    };
    request.onerror = () => reject(new Error("no answer"));
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
    showAddress();
    announce.textContent = "The page was updated.";
  } catch {
    if (!leaving) location.reload();
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
    const query = new URLSearchParams({ page: location.pathname + location.search, look: document.body.dataset.look });
    const source = new EventSource(`/live?${query}`);
    source.addEventListener("open", () => setState("Live", "on"));
    source.addEventListener("error", () => setState("Not live", "off"));
    source.addEventListener("changed", refresh);
    source.addEventListener("ended", () => {
      source.close();
      if (!leaving) location.reload();
    });
    window.addEventListener("pagehide", () => source.close());
  }
}
