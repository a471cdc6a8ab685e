// Pointing at a token shows its loss, and which retrieved tokens the model read to predict it.
"use strict";
const WHOLE = Number(document.getElementById("read").dataset.whole); // stands for a weight of 1
const shared = "shared" in document.getElementById("read").dataset; // the weights sum to a share of the attention
const reads = JSON.parse(document.getElementById("read").textContent);
const chunks = [...document.querySelectorAll(".chunk")];
const tokens = [...document.querySelectorAll(".t")];
const statusLine = document.getElementById("status");
const help = statusLine.textContent;
const reader = document.getElementById("reads"); // missing for a model that reads nothing
const controls = document.querySelector(".controls");
let lit = [];
let picked = null;
let stop = tokens[0]; // the one token that Tab reaches; the arrow keys move from there

function shown(text) {
  return text ? "‘" + text.replaceAll("\n", "⏎") + "’" : "part of a character";
}

function documentOf(value) {
  return value.closest(".value").querySelector("bdi").textContent;
}

function clear() {
  for (const value of lit) {
    value.classList.remove("lit", "strongest");
    value.style.removeProperty("--w");
  }
  lit = [];
  if (picked) picked.classList.remove("picked");
  picked = null;
  statusLine.textContent = help;
}

function point(token) {
  clear();
  picked = token;
  token.classList.add("picked");
  const chunk = Number(token.dataset.chunk);
  const weights = reads[chunk][Number(token.dataset.position)];
  let line = shown(token.textContent) + ": ";
  line += token.dataset.on
    ? `${token.dataset.on} nats with retrieval, ${token.dataset.off} without`
    : token.dataset.off ? `${token.dataset.off} nats` : "the first token, which is not predicted";
  if (weights.length) {
    const values = [...chunks[chunk - 1].querySelectorAll(".v")];
    const order = weights.map((weight, i) => [weight, i]).sort((a, b) => b[0] - a[0]);
    const largest = order[0][0];
    for (const [weight, i] of order) {
      if (weight === 0) break;
      values[i].classList.add("lit");
      values[i].style.setProperty("--w", `${Math.round((100 * weight) / largest)}%`);
      lit.push(values[i]);
    }
    if (largest > 0) values[order[0][1]].classList.add("strongest");
    const first = order.slice(0, 3).filter(([weight]) => weight > 0);
    const percent = (weight) => `${(weight / WHOLE * 100).toFixed(0)} %`;
    line += shared ? `; ${percent(weights.reduce((a, b) => a + b))} of the attention on what was retrieved, such as ` : "; read ";
    line += first.map(([w, i]) => `${shown(values[i].textContent)} ${percent(w)} (${documentOf(values[i])})`).join(", ");
  } else if (chunk > 0 && reader) {
    line += "; nothing was read";
  } else if (reader) {
    line += "; the first chunk reads nothing";
  }
  statusLine.textContent = line;
}

function step(token, key) {
  const index = tokens.indexOf(token);
  const chunk = Number(token.dataset.chunk);
  const first = (number) => tokens.findIndex((other) => Number(other.dataset.chunk) === number);
  const targets = {
    ArrowRight: index + 1, ArrowLeft: index - 1, ArrowDown: first(chunk + 1), ArrowUp: first(chunk - 1),
    Home: 0, End: tokens.length - 1,
  };
  return tokens[targets[key]];
}

// Scrolling to a focused token leaves it uncovered by the controls and the status line.
function keepVisible() {
  const above = getComputedStyle(controls).position === "sticky" ? controls.offsetHeight : 0;
  document.documentElement.style.scrollPadding = `${above + 16}px 0 ${statusLine.offsetHeight + 48}px`;
}

for (const token of tokens) {
  token.addEventListener("mouseenter", () => point(token));
  token.addEventListener("mouseleave", () => {
    clear();
    if (tokens.includes(document.activeElement)) point(document.activeElement);
  });
  token.addEventListener("focus", () => {
    stop.tabIndex = -1;
    stop = token;
    stop.tabIndex = 0;
    point(token);
  });
  token.addEventListener("blur", clear);
  token.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return; // shortcuts of the browser
    if (event.key === "Escape") token.blur();
    const next = step(token, event.key);
    if (!next) return;
    event.preventDefault();
    keepVisible();
    next.focus();
  });
}
if (stop) stop.tabIndex = 0;
keepVisible();
