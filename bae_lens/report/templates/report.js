"use strict";

// Tables: a click on a heading sorts by it, numbers from the largest, text from A; a second click reverses.

function sortByColumn(table, column) {
  const heading = table.tHead.rows[0].cells[column];
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, text: row.cells[column].textContent.trim() }));
  const numeric = rows.every(({ text }) => !Number.isNaN(parseFloat(text)) || text.startsWith("nan"));
  const before = heading.getAttribute("aria-sort");
  const ascending = before ? before === "descending" : !numeric;
  const order = (a, b) => (numeric ? compareNumbers(parseFloat(a), parseFloat(b)) : a.localeCompare(b));
  rows.sort((a, b) => (ascending ? 1 : -1) * order(a.text, b.text));
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  body.append(...rows.map(({ row }) => row));
}

function compareNumbers(a, b) {
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(b) - Number.isNaN(a);
  return a - b;
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    cell.querySelector("button").addEventListener("click", () => sortByColumn(table, column));
  });
}

// Features: a dictionary, a search and an order make a list; one feature of it is shown.

const dictionaries = JSON.parse(document.getElementById("feature-data").textContent);
const control = Object.fromEntries(
  ["dictionary", "search", "order", "feature", "previous", "next", "position", "dashboard"].map((name) => [
    name,
    document.getElementById(`feature-${name}`),
  ]),
);
const ORDERS = {
  frequent: (a, b) => b.firing_rate - a.firing_rate,
  rare: (a, b) => a.firing_rate - b.firing_rate,
  index: (a, b) => a.feature - b.feature,
};
let listed = [];

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function percent(share) {
  return `${Number((100 * share).toPrecision(3))} %`;
}

// A token whose spaces and line ends can be seen.
function visible(token) {
  return token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^\s+$/, (blank) => "␣".repeat(blank.length)) || "(empty)";
}

function allFeatures() {
  return dictionaries[control.dictionary.value].features;
}

function listFeatures(wanted = null) {
  const text = control.search.value.trim().toLowerCase();
  listed = allFeatures()
    .filter(({ examples }) => !text || examples.some(({ token }) => token.toLowerCase().includes(text)))
    .sort(ORDERS[control.order.value]);
  control.feature.replaceChildren(
    ...listed.map(({ feature, firing_rate, examples }, index) => {
      const strongest = examples.length ? ` · ${visible(examples[0].token).trim()}` : "";
      return element("option", { value: index, textContent: `${feature} · ${percent(firing_rate)}${strongest}` });
    }),
  );
  show(Math.max(0, listed.findIndex(({ feature }) => feature === wanted)));
}

function show(index) {
  const none = listed.length === 0;
  control.feature.value = none ? "" : index;
  control.feature.disabled = none;
  control.previous.disabled = none || index === 0;
  control.next.disabled = none || index === listed.length - 1;
  control.position.textContent = none ? "none" : `${index + 1} of ${listed.length}`;
  control.dashboard.replaceChildren(...(none ? [nothing()] : dashboard(listed[index])));
}

function nothing() {
  const reason = allFeatures().length ? `No feature of the sample has such a ${control.dashboard.dataset.unit}.` : "No feature of it fires often enough.";
  return element("p", { textContent: reason });
}

function dashboard({ feature, firing_rate, examples, neighbors, top_tokens }) {
  const rate = `on for ${percent(firing_rate)} of the held-out ${control.dashboard.dataset.unit}s`;
  const facts = element("dl", { className: "facts" });
  const add = (name, ...values) => facts.append(element("dt", { textContent: name }), element("dd", {}, ...values));
  if (top_tokens.length) add("raises the logits of", ...top_tokens.map(tokenBox));
  if (neighbors.length) add("points like", ...neighbors.map(neighborLink));
  return [
    element("h3", { textContent: `Feature ${feature}, ${rate}` }),
    element("ol", { className: "examples" }, ...examples.map(exampleItem)),
    facts,
  ];
}

function tokenBox(token) {
  return element("span", { className: "token", textContent: visible(token) });
}

function exampleItem({ before, token, after, activation }) {
  const strength = element("span", { className: "strength", textContent: activation.toPrecision(3) });
  const space = token.startsWith(" ") && token.trim() ? " " : "";
  const whole = control.dashboard.dataset.unit === "vector"; // which nothing stands around that it must be told from
  const mark = element(whole ? "span" : "mark", { textContent: visible(token.slice(space.length)) });
  const text = element("span", {}, before, space, mark, after);
  return element("li", {}, strength, text);
}

function neighborLink({ feature, cosine }) {
  const label = `${feature} (cosine ${cosine.toFixed(2)})`;
  if (!allFeatures().some((other) => other.feature === feature)) {
    return element("span", { className: "token", textContent: label, title: "not in the sample" });
  }
  const button = element("button", { type: "button", className: "token", textContent: label });
  button.addEventListener("click", () => {
    control.search.value = "";
    listFeatures(feature);
    control.feature.focus();
  });
  return button;
}

control.dictionary.addEventListener("change", () => listFeatures());
control.search.addEventListener("input", () => listFeatures(listed[control.feature.value]?.feature));
control.order.addEventListener("change", () => listFeatures());
control.feature.addEventListener("change", () => show(Number(control.feature.value)));
control.previous.addEventListener("click", () => show(Number(control.feature.value) - 1));
control.next.addEventListener("click", () => show(Number(control.feature.value) + 1));
listFeatures();
