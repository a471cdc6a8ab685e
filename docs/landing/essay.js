// The essay's three moving parts. Without this file, the page shows all steps and all three staircases.
"use strict";
const root = document.documentElement;
root.classList.add("scripted");

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// The theme: the system's, light or dark. The book keeps its choice under the same name.
const pages = [...document.querySelectorAll("iframe")];

function stored(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null; // no storage, for example in a file that was opened from a disk
  }
}

function paintPage(page) {
  try {
    page.contentDocument.getElementById(root.dataset.theme || "system").checked = true;
  } catch {
    // A page from a disk keeps the system's theme.
  }
}

function setTheme(theme) {
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  else delete root.dataset.theme;
  pages.forEach(paintPage);
}

const themes = element("select", { ariaLabel: "Theme" });
for (const [value, label] of [["auto", "the system's theme"], ["light", "light"], ["dark", "dark"]]) {
  themes.append(element("option", { value, textContent: label }));
}
themes.value = ["light", "dark"].includes(stored("theme")) ? stored("theme") : "auto";
themes.addEventListener("change", () => {
  setTheme(themes.value);
  try {
    localStorage.setItem("theme", themes.value);
  } catch {
    // The choice then holds for this page alone.
  }
});
for (const page of pages) page.addEventListener("load", () => paintPage(page));
document.getElementById("theme").append(themes);
setTheme(themes.value);

// The stepper
const stepper = document.getElementById("steps");
const steps = [...stepper.querySelectorAll(".step")];
let step = 0;
const back = element("button", { type: "button", textContent: "← back" });
const next = element("button", { type: "button", textContent: "next step →" });
const where = element("span", { className: "where" });
where.setAttribute("aria-live", "polite");
const controls = element("div", { className: "steps" }, back, next, where);
controls.setAttribute("role", "group");
controls.setAttribute("aria-label", "Steps of the drawing");

function showStep(number) {
  step = Math.max(0, Math.min(steps.length - 1, number));
  steps.forEach((section, i) => (section.hidden = i !== step));
  back.disabled = step === 0;
  next.disabled = step === steps.length - 1;
  where.textContent = `step ${step + 1} of ${steps.length}`;
}

back.addEventListener("click", () => showStep(step - 1));
next.addEventListener("click", () => showStep(step + 1));
controls.addEventListener("keydown", (event) => {
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!move) return;
  event.preventDefault();
  showStep(step + move);
  if (document.activeElement.disabled || document.activeElement === document.body) (move > 0 ? back : next).focus();
});
stepper.prepend(controls);
stepper.classList.add("live");
showStep(0);

// The staircase: three drawings, of which one is shown. The bars follow the pointer between two shifts.
const staircase = document.getElementById("shift");
const shifts = [...staircase.querySelectorAll(".shift")]; // from m down to m − 2
const names = ["m", "m − 1", "m − 2"];
const ROW = 32; // height of a row, in units of the drawing
const slider = element("input", { type: "range", min: 0, max: 2, step: 1, value: 1, id: "shift-slider" });
const label = element("label", { textContent: "shift", htmlFor: "shift-slider" });
const output = element("output", { htmlFor: "shift-slider" });
let shown = 1;
let drag = null;

function showShift(number) {
  shown = number;
  shifts.forEach((part, i) => (part.hidden = i !== number));
  slider.value = number;
  slider.setAttribute("aria-valuetext", names[number]);
  output.textContent = names[number];
}

function place(offset) {
  for (const part of shifts) {
    const bars = part.querySelector(".bars");
    if (offset) bars.setAttribute("transform", `translate(0 ${offset})`);
    else bars.removeAttribute("transform");
  }
}

staircase.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".bars")) return;
  event.preventDefault();
  const drawing = event.target.closest("svg");
  drag = { y: event.clientY, from: shown, scale: drawing.viewBox.baseVal.width / drawing.getBoundingClientRect().width };
  staircase.setPointerCapture(event.pointerId);
});
staircase.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const moved = ((event.clientY - drag.y) * drag.scale) / ROW; // rows; a bar that goes down has a larger shift
  const wanted = Math.max(0, Math.min(2, drag.from - moved));
  showShift(Math.round(wanted));
  place((shown - wanted) * ROW);
});
for (const name of ["pointerup", "pointercancel"]) {
  staircase.addEventListener(name, () => {
    drag = null;
    place(0);
  });
}
slider.addEventListener("input", () => showShift(Number(slider.value)));
staircase.prepend(element("div", { className: "slider" }, label, slider, output));
for (const part of shifts) part.querySelector(".says").setAttribute("aria-live", "polite");
staircase.classList.add("live");
showShift(1);
