"use strict";
// Tables that sort, links that open what they lead to, and a field that finds a cell.
// The page says everything without it.

function key(cell) {
  if (cell.tagName === "TH") return cell.textContent.trim();
  return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
}

function compare(a, b) {
  return typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
}

// Rows without a value come last in either direction.
function sort(table, column, direction) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => [key(row.cells[column]), row]);
  const known = rows.filter(([value]) => value !== null);
  const unknown = rows.filter(([value]) => value === null);
  known.sort(([a], [b]) => direction * compare(a, b));
  body.append(...[...known, ...unknown].map(([, row]) => row));
}

function makeSortable(table) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      sort(table, column, rising ? 1 : -1);
    });
  });
}

// A browser scrolls to a cell that is closed but does not open it.
function openTarget(hash) {
  const target = document.getElementById(hash.slice(1));
  if (!(target instanceof HTMLDetailsElement)) return;
  target.closest("section").hidden = false;
  target.hidden = false;
  target.open = true;
}

function followLink(event) {
  const link = event.target.closest('a[href^="#"]');
  if (link) openTarget(link.hash);
}

function words(text) {
  return text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
}

function addFilter(section, cells) {
  const label = document.createElement("label");
  const field = document.createElement("input");
  field.type = "search";
  label.append("Find a cell ", field);
  section.querySelector("h2").after(label);
  field.addEventListener("input", () => {
    const wanted = words(field.value);
    for (const cell of cells) {
      const known = words(cell.dataset.name);
      cell.hidden = !wanted.every((word) => known.some((other) => other.startsWith(word)));
    }
    for (const group of section.querySelectorAll("section.group")) {
      group.hidden = !group.querySelector("details.cell:not([hidden])");
    }
  });
}

document.querySelectorAll("table.scores").forEach(makeSortable);
const section = document.getElementById("cells");
addFilter(section, section.querySelectorAll("details.cell"));
addEventListener("click", followLink);
addEventListener("hashchange", () => openTarget(location.hash));
openTarget(location.hash);
