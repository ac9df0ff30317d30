"use strict";
// Sorting and copying. Without this script the page shows the same content.

function sortKey(row, column) {
  const raw = row.cells[column].dataset.sort;
  if (raw === undefined || raw === "") return null;
  const number = Number(raw === "inf" ? "Infinity" : raw);
  return Number.isNaN(number) ? raw : number;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortTable(table, column, descending) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => [sortKey(row, column), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null); // what is not there comes last
    return descending ? compare(b, a) : compare(a, b);
  });
  body.append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll(".table table")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortTable(table, column, descending);
    });
  });
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // A page opened from disk may have no clipboard; the old way needs a selected field.
    const field = document.createElement("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}

async function answer(button, text, what) {
  const done = await copy(text);
  document.getElementById("status").textContent = done ? `Copied ${what}.` : "The browser did not allow copying.";
  if (done) {
    button.classList.add("done");
    setTimeout(() => button.classList.remove("done"), 1500);
  }
  button.focus();
}

for (const line of document.querySelectorAll(".copy")) {
  line.hidden = false;
  line.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const source = line.parentElement.querySelector(`template[data-format="${button.dataset.format}"]`);
    answer(button, source.content.textContent, `as ${button.textContent}`);
  });
}

for (const button of document.querySelectorAll(".command button")) {
  button.hidden = false;
  const text = button.previousElementSibling.textContent;
  button.addEventListener("click", () => answer(button, text, "the command"));
}

// On paper every part is open but the samples and tables of many pages, which stay as the reader left them.
const LONG = 100; // rows
let closed = [];
addEventListener("beforeprint", () => {
  closed = Array.from(document.querySelectorAll("details:not([open]):not(.sample)"))
    .filter((part) => part.querySelectorAll("tr").length <= LONG);
  for (const part of closed) part.open = true;
});
addEventListener("afterprint", () => {
  for (const part of closed) part.open = false;
});
