// The tabs below the plot: tables of values, corrections and runs, and the lines of code that read the same.

import {$, el, urlOf} from "./api.js";
import {kindOf, standing} from "./picture.js";
import {digits, showTime, zoneName} from "./times.js";

const ROW = 30; // pixels, as docs.css has it
const BEYOND = 20; // rows above and below those that are seen

// ---- A table whose rows are made as they are scrolled to

export class Table {
  // onPick(row) is called for a row that is clicked.
  constructor(place, label, onPick = () => {}) {
    this.rows = [];
    this.onPick = onPick;
    this.scroller = el("div", {class: "scroller", tabindex: "0", role: "region", "aria-label": label});
    this.scroller.addEventListener("scroll", () => this.#draw());
    place.append(this.scroller);
  }

  // fill shows rows in columns: {name, width in characters, of(row) → text or node, exact?(row) → title, isNumber?}.
  // marked(row) is the class of a row.
  fill(columns, rows, marked = () => "") {
    const {scrollTop} = this.scroller;
    const selected = rows.includes(this.selected) ? this.selected : null;
    Object.assign(this, {columns, rows, marked, selected});
    this.scroller.hidden = rows.length === 0;
    this.head = el(
      "tr",
      {"aria-rowindex": "1"},
      ...columns.map((column) =>
        el("th", {scope: "col", class: column.isNumber ? "number" : false}, column.name),
      ),
    );
    this.body = el("tbody");
    const widths = columns.map((column) => {
      const node = el("col");
      node.style.width = `${column.width}ch`;
      return node;
    });
    const table = el(
      "table",
      {"aria-rowcount": String(rows.length + 1)},
      el("colgroup", {}, ...widths),
      el("thead", {}, this.head),
      this.body,
    );
    table.style.minWidth = `${columns.reduce((sum, column) => sum + column.width, 0)}ch`;
    this.scroller.replaceChildren(table);
    this.#draw();
    this.scroller.scrollTop = scrollTop; // where it was, if there are so many rows
    this.#draw();
  }

  #draw() {
    const {scrollTop, clientHeight} = this.scroller;
    const first = Math.max(0, Math.floor(scrollTop / ROW) - BEYOND);
    const last = Math.min(this.rows.length, Math.ceil((scrollTop + (clientHeight || 400)) / ROW) + BEYOND);
    const isFocused = this.body.contains(document.activeElement); // do not take a button away that has the focus
    if (isFocused && first >= this.first && last <= this.last) return;
    [this.first, this.last] = [first, last];
    this.body.replaceChildren(
      space(first),
      ...this.rows.slice(first, last).map((row, i) => this.#row(row, first + i)),
      space(this.rows.length - last),
    );
  }

  #row(row, place) {
    const cells = this.columns.map(({of, exact, isNumber}) =>
      el("td", {class: isNumber ? "number" : false, title: exact?.(row)}, of(row) ?? ""),
    );
    const classes = `${this.marked(row)}${row === this.selected ? " selected" : ""}`;
    return el(
      "tr",
      {class: classes || false, "aria-rowindex": String(place + 2), onclick: () => this.onPick(row)},
      ...cells,
    );
  }

  // select marks a row and scrolls to it.
  select(row) {
    if (this.selected === row) return;
    this.selected = row;
    const place = this.rows.indexOf(row);
    if (place < 0) return;
    const {scrollTop, clientHeight} = this.scroller;
    const top = place * ROW;
    if (top < scrollTop || top > scrollTop + clientHeight - 3 * ROW) {
      this.scroller.scrollTop = top - clientHeight / 2;
      this.#draw();
    }
    for (const node of this.body.children)
      node.classList.toggle("selected", node.getAttribute("aria-rowindex") === String(place + 2));
  }
}

function space(rows) {
  const row = el("tr", {class: "space", "aria-hidden": "true"}, el("td"));
  row.style.height = `${rows * ROW}px`;
  return row;
}

const time = (text) => (text ? showTime(Date.parse(text)) : "");
const second = (text) => showTime(Math.floor(Date.parse(text) / 1000) * 1000); // of what a clock of the database says
const named = (color, key) => el("span", {}, el("span", {class: `dot ${color}`, "aria-hidden": "true"}), key);
const exact = (value) => (value === null || value === undefined ? undefined : String(value));

// inRow is a button of a row, which does not pick the row.
const inRow = (label, text, action) =>
  el(
    "button",
    {
      type: "button",
      "aria-label": label,
      onclick: (event) => {
        event.stopPropagation();
        action();
      },
    },
    text,
  );

// ---- The three tables

// What several tables show alike.
const validTime = () => ({
  name: `valid time (${zoneName()})`,
  width: 22,
  of: (row) => time(row.valid_time),
  exact: (row) => row.valid_time,
});
const ofSeries = (colorOf, width) => ({
  name: "series",
  width,
  of: (row) => named(colorOf(row.series_key), row.series_key),
  exact: (row) => row.series_key,
});
const author = {name: "by", width: 22, of: (row) => row.changed_by, exact: (row) => row.changed_by ?? undefined};
const reasonOf = (row) =>
  [row.annotation ?? "", ...(row.tags ?? []).map((tag) => `#${tag}`)].filter(Boolean).join(" ");
const reason = (width) => ({name: "why", width, of: reasonOf, exact: (row) => reasonOf(row) || undefined});

export function valueColumns(picture, colorOf, correct) {
  const columns = [
    validTime(),
    ofSeries(colorOf, 30),
    {
      name: picture.bucket ? "mean" : "value",
      width: 14,
      isNumber: true,
      of: (row) => digits(row.value),
      exact: (row) => exact(row.value),
    },
    {
      name: "unit",
      width: 10,
      of: (row) => (row.series_unit === "dimensionless" ? "" : row.series_unit),
      exact: (row) => row.series_unit,
    },
  ];
  if (picture.bucket) {
    const number = (name) => ({
      name,
      width: 14,
      isNumber: true,
      of: (row) => digits(row[name]),
      exact: (row) => exact(row[name]),
    });
    return [...columns, number("min"), number("max"), number("count")];
  }
  const button = (row) =>
    inRow(`Correct ${row.series_key} at ${time(row.valid_time)}`, "Correct…", () => correct(row));
  return [
    ...columns,
    {name: "known", width: 18, of: (row) => time(row.known_time), exact: (row) => row.known_time},
    {name: "version", width: 9, isNumber: true, of: (row) => String(row.version)},
    author,
    reason(26),
    {name: "correct", width: 14, of: button},
  ];
}

export function correctionColumns(colorOf) {
  return [
    validTime(),
    ofSeries(colorOf, 28),
    {
      name: "from",
      width: 13,
      isNumber: true,
      of: (row) => (kindOf(row) === "added" ? "added" : digits(row.old_value)),
      exact: (row) => exact(row.old_value),
    },
    {name: "to", width: 13, isNumber: true, of: (row) => digits(row.value), exact: (row) => exact(row.value)},
    author,
    {name: "when", width: 18, of: (row) => second(row.change_time), exact: (row) => row.change_time},
    {name: "of the run known", width: 18, of: (row) => time(row.known_time), exact: (row) => row.known_time},
    reason(32),
  ];
}

// shownOf counts, for each run, how many of the values in the picture are its own.
export function shownOf(picture) {
  const counts = new Map();
  if (picture.bucket) return counts;
  for (const row of picture.rows) counts.set(row.run_id, (counts.get(row.run_id) ?? 0) + 1);
  return counts;
}

export function runColumns(moments, shown, withdraw) {
  const state = (run) => {
    const word = standing(run, moments);
    if (!run.withdrawn_at) return word;
    const by = `withdrawn ${second(run.withdrawn_at)} by ${run.withdrawn_by ?? "someone"}${run.annotation ? `: ${run.annotation}` : ""}`;
    return word === "withdrawn" ? by : `${word}; later ${by}`;
  };
  const button = (run) =>
    run.withdrawn_at
      ? ""
      : inRow(`Withdraw the run known ${time(run.known_time)}`, "Withdraw…", () => withdraw(run));
  return [
    {
      name: `known (${zoneName()})`,
      width: 20,
      of: (run) => time(run.known_time),
      exact: (run) => run.known_time,
    },
    {name: "workflow", width: 20, of: (run) => run.workflow_id, exact: (run) => run.workflow_id},
    {name: "stored", width: 20, of: (run) => second(run.inserted_at), exact: (run) => run.inserted_at},
    author,
    {name: "values", width: 9, isNumber: true, of: (run) => run.rows.toLocaleString("en")},
    {name: "in the picture", width: 14, isNumber: true, of: (run) => String(shown.get(run.run_id) ?? "")},
    {name: "state", width: 48, of: state, exact: state},
    {name: "withdraw", width: 15, of: button},
  ];
}

// ---- Code

const inShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// fillCode shows how to read the same from a terminal and from a notebook. URLs are encoded, so that no name of a series
// can be more than a text in either.
export function fillCode(parameters) {
  const url = urlOf("values", parameters).replaceAll("'", "%27");
  const csv = urlOf("values", [...parameters, ["format", "csv"]]).replaceAll('"', "%22");
  $("curl").textContent = `curl -H "X-API-Key: $TIMEDB_KEY" ${inShell(url)}`;
  $("pandas").textContent = [
    "import os, pandas as pd",
    "",
    "df = pd.read_csv(",
    `    "${csv}",`,
    '    storage_options={"X-API-Key": os.environ["TIMEDB_KEY"]}, parse_dates=["valid_time"])',
  ].join("\n");
}

// ---- Which tab is open

// initTabs makes the tabs work with pointer and keys; onOpen(name) is told which one was opened.
export function initTabs(onOpen) {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => onOpen(nameOf(tab)));
    tab.addEventListener("keydown", (event) => {
      const step = {ArrowRight: 1, ArrowLeft: -1, Home: -i, End: tabs.length - 1 - i}[event.key];
      if (step === undefined) return;
      event.preventDefault();
      const next = tabs.at((i + step) % tabs.length);
      next.focus();
      onOpen(nameOf(next));
    });
  });
}

const nameOf = (tab) => tab.id.slice("tab-".length);

export function openTab(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const isOpen = nameOf(tab) === name;
    tab.setAttribute("aria-selected", String(isOpen));
    tab.tabIndex = isOpen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !isOpen;
  }
}

export const tabNames = () => [...document.querySelectorAll("[role=tab]")].map(nameOf);
