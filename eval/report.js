"use strict";
// Filters and orders the rows of samples; everything it reads stands in the table.
const table = document.getElementById("samples");
const rows = [...table.rows].map((row) => ({
  row,
  text: [...row.querySelectorAll(".text")].map((part) => part.textContent.toLowerCase()).join("\n"),
  preferences: row.dataset.preferences.split(",").map((p) => (p === "" ? null : Number(p))),
}));
const control = (name) => document.getElementById(name);
const value = (name, otherwise) => control(name)?.value ?? otherwise;

function outcome(preference) {
  if (preference === null) return "none";
  if (Math.abs(preference - 0.5) <= 1e-9) return "tie";
  return preference > 0.5 ? "win" : "loss";
}

function update() {
  const wanted = value("filter", "").toLowerCase();
  const won = value("outcome", "all");
  const order = value("order", "given");
  const preference = (each) => each.preferences[Number(value("judged", "0"))] ?? null;
  let shown = 0;
  for (const each of rows) {
    const fits = won === "all" || outcome(preference(each)) === won;
    each.row.hidden = !(fits && each.text.includes(wanted));
    if (!each.row.hidden) shown += 1;
  }
  const sign = order === "high" ? -1 : 1;
  const rank = (each) => (preference(each) === null ? Infinity : sign * preference(each));
  const sorted = order === "given" ? rows : [...rows].sort((a, b) => rank(a) - rank(b) || 0);
  table.append(...sorted.map((each) => each.row));
  control("shown").textContent = shown;
}

for (const name of ["filter", "outcome", "judged", "order"]) {
  control(name)?.addEventListener("input", update);
}
update(); // a browser may have kept what was chosen before the page was loaded again
