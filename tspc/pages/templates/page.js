"use strict";
// A heading sorts its table: by the cells' data-v where they have one, else by their text.
for (const button of document.querySelectorAll("[data-sort]")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const column = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => {
      const cell = row.cells[column], text = cell.dataset.v ?? cell.textContent.trim();
      return text !== "" && !isNaN(text) ? Number(text) : text;
    };
    const order = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "") || 0;
      const sign = down ? -1 : 1;
      return sign * (typeof a === "number" && typeof b === "number" ? a - b
        : String(a).localeCompare(String(b), "en", {numeric: true}));
    };
    const rows = Array.from(body.rows, row => [key(row), row]);
    rows.sort((a, b) => order(a[0], b[0]));
    body.append(...rows.map(pair => pair[1]));
  });
}
// What a figure's mark stands for is told where it is pointed at, or reached by the keyboard.
const tip = document.getElementById("tip");
function show(mark) {
  tip.textContent = mark.dataset.tip;
  tip.hidden = false;
  const at = mark.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = at.left + at.width / 2 - own.width / 2;
  tip.style.left = Math.max(8, Math.min(left, innerWidth - own.width - 8)) + "px";
  tip.style.top = (at.top - own.height - 8 > 0 ? at.top - own.height - 8 : at.bottom + 8) + "px";
}
for (const mark of document.querySelectorAll("[data-tip]")) {
  for (const kind of ["pointerenter", "focus"]) mark.addEventListener(kind, () => show(mark));
  for (const kind of ["pointerleave", "blur"]) mark.addEventListener(kind, () => { tip.hidden = true; });
}
addEventListener("scroll", () => { tip.hidden = true; }, {passive: true});
