// What is on the page. Elements are made one by one, and text is only ever text: no HTML is parsed (Trusted Types).

/** An element with attributes and children; strings become text. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") made.addEventListener("click", value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== undefined));
  return made;
}

const main = () => document.getElementById("main");

/** Replace what is shown, and move the focus to its heading, so that screen readers read on from there. */
export function show(title, ...children) {
  const heading = element("h1", { tabindex: "-1" }, title);
  main().replaceChildren(heading, ...children.filter((child) => child !== undefined));
  document.title = `${title} · Ringfence`;
  heading.focus();
}

/** The rows of a message: label and text, each isolated from the direction of its neighbours. */
export function rowList(rows) {
  const list = element("dl", { class: "rows" });
  for (const { label, text, style } of rows) {
    list.append(element("dt", {}, label), element("dd", { class: style || "plain", dir: "ltr" }, element("bdi", {}, text)));
  }
  return list;
}

export const paragraph = (text, style) => element("p", { class: style }, text);

export const warningBox = (warnings) =>
  warnings.length
    ? element("div", { class: "warning", role: "note" }, ...warnings.map((text) => paragraph(text)))
    : undefined;

export const button = (label, onclick, style = "primary") => element("button", { type: "button", class: style, onclick }, label);

/** Keys to choose from; `value()` is the chosen one. With one key there is nothing to choose. */
export function keyChoice(keys, labels, chosen) {
  if (keys.length === 1) {
    return { node: paragraph(`You sign with: ${labels[0]}`, "key"), value: () => keys[0] };
  }
  const inputs = keys.map((key, at) =>
    element("input", { type: "radio", name: "key", value: key.kid, checked: at === Math.max(0, chosen) }),
  );
  const choices = inputs.map((input, at) => element("label", { class: "choice" }, input, labels[at]));
  return {
    node: element("fieldset", {}, element("legend", {}, "You sign with"), ...choices),
    value: () => keys[Math.max(0, inputs.findIndex((input) => input.checked))],
  };
}

/** A text to copy, with a button that does. */
export function copyBox(label, text) {
  const area = element("textarea", { id: "copy", readonly: true, rows: "6", spellcheck: "false" });
  area.value = text;
  const status = element("span", { role: "status", class: "quiet" });
  const copy = button("Copy", async () => {
    area.select();
    try {
      await navigator.clipboard.writeText(text);
      status.textContent = "Copied.";
    } catch {
      status.textContent = "Press Ctrl+C to copy what is selected.";
    }
  }, "secondary");
  return element("div", { class: "copy" }, element("label", { for: "copy" }, label), area, element("div", { class: "buttons" }, copy, status));
}

/** A link that saves a text as a file. */
export function download(label, filename, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  return element("a", { class: "button secondary", href: url, download: filename }, label);
}

/** Buttons that are busy while their work is under way. */
export function setBusy(busy) {
  for (const one of main().querySelectorAll("button")) one.disabled = busy;
  main().setAttribute("aria-busy", String(busy));
}

/** Show an error below what is shown, or in place of an earlier one. */
export function showProblem(text) {
  document.getElementById("problem")?.remove();
  const box = element("p", { id: "problem", class: "problem", role: "alert" }, text);
  main().append(box);
}
