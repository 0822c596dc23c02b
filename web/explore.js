// The page's first view: what is chosen, where that is kept, and what happens when it changes.

import {$, el, get, getBlob, supersede, useKey} from "./api.js";
import {drawErrors, errorColumns, errorsByLead, fillChoices, runsOf} from "./lead.js";
import {
  about,
  bySeries,
  closed,
  extent,
  forget,
  lineParameters,
  loadNow,
  loadRevisions,
  loadThen,
  marksOf,
  standing,
} from "./picture.js";
import {Moment} from "./moments.js";
import {Plot} from "./plot.js";
import {forgetExamples, initReference, showExamples} from "./reference.js";
import {
  Table,
  correctionColumns,
  fillCode,
  initTabs,
  openTab,
  runColumns,
  shownOf,
  tabNames,
  valueColumns,
} from "./tabs.js";
import {DAY, HOUR, iso, many, setZone, showDate, showTime, timeIn, zoneName} from "./times.js";
import {correct, withdraw} from "./writes.js";

const COLORS = 10;
const MOST_LISTED = 300; // series in the list; others are found by a part of their name
const TICKING = 150; // milliseconds in which ticks are collected into one question
const SLIDING = 40; // likewise of a slider
const PATIENCE = 150; // milliseconds before a picture that is out of date fades

// What the link of the page holds, and nothing else does. Times are in milliseconds; null bounds nothing, or is now.
const state = {
  view: "explore",
  keys: [],
  from: null,
  to: null,
  known: null,
  stored: null,
  zone: "UTC",
  revisions: true,
  tab: "values",
};

let catalog = []; // the series of the tenant: {series_key, series_id, unit, description}
let loaded = null; // what was read for the window: {window, bucket, now, revisions, runs, corrections}
let isLoading = false; // the whole of it, not only what a moment changes
let picture = null; // what is drawn of it at the two moments
const colors = new Map(); // series_key → color, kept while the series is ticked
const past = []; // windows, to go back to
let arriving = null; // the time that the cursor goes to once the picture is there

// ---- The link

function readLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  const at = (name) => {
    const time = Date.parse(link.get(name) ?? "");
    return Number.isFinite(time) ? time : null;
  };
  Object.assign(state, {
    view: link.get("view") === "reference" ? "reference" : "explore",
    keys: [...new Set(link.getAll("series_key"))],
    from: at("start_valid"),
    to: at("end_valid"),
    known: at("end_known"),
    stored: at("as_of"),
    zone: link.get("zone") === "local" ? "local" : "UTC",
    revisions: link.get("revisions") !== "off",
    tab: tabNames().includes(link.get("tab")) ? link.get("tab") : "values",
  });
  setZone(state.zone);
  $("zone").value = state.zone;
  $("revisions").checked = state.revisions;
  openTab(state.tab);
}

function linkOf(view) {
  const link = new URLSearchParams({view});
  for (const key of state.keys) link.append("series_key", key);
  const times = {start_valid: state.from, end_valid: state.to, end_known: state.known, as_of: state.stored};
  for (const [name, time] of Object.entries(times)) if (time !== null) link.set(name, iso(time));
  if (state.zone !== "UTC") link.set("zone", state.zone);
  if (!state.revisions) link.set("revisions", "off");
  if (state.tab !== "values") link.set("tab", state.tab);
  return `#${link}`;
}

function writeLink() {
  history.replaceState(null, "", linkOf(state.view));
  $("go-explore").href = linkOf("explore");
  $("go-reference").href = linkOf("reference");
}

function showView() {
  for (const view of ["explore", "reference"]) {
    $(view).hidden = state.view !== view;
    if (state.view === view) $(`go-${view}`).setAttribute("aria-current", "page");
    else $(`go-${view}`).removeAttribute("aria-current");
  }
  if (state.view === "explore") plot.draw(picture);
}

// ---- What is said in place of the plot, and beside it

function say(text, isError = false) {
  $("said").textContent = text;
  $("said").classList.toggle("error", isError);
}

// instead puts a sentence where the plot would be, perhaps with a button, so that nothing stale stays.
function instead(text, {isError = false, button = null} = {}) {
  picture = null;
  plot.clear();
  $("note").textContent = "";
  $("canvas").hidden = true;
  const parts = [el("p", {class: isError ? "error" : "quiet", role: isError ? "alert" : "status"}, text)];
  if (button) parts.push(el("button", {type: "button", onclick: button.onclick}, button.text));
  $("instead").replaceChildren(...parts);
  $("instead").hidden = false;
  fillTabs();
}

let fading = null;
function setBusy(isBusy) {
  clearTimeout(fading);
  if (isBusy) fading = setTimeout(() => showBusy(true), PATIENCE);
  else showBusy(false);
}
function showBusy(isBusy) {
  $("progress").hidden = !isBusy;
  $("workspace").classList.toggle("waiting", isBusy);
}

// ---- Loading

const timers = new Map();
function later(work, delay) {
  clearTimeout(timers.get(work));
  timers.set(work, setTimeout(work, delay));
}

// attempt runs what asks the server. What was superseded meanwhile ends without a word.
async function attempt(work, again) {
  setBusy(true);
  try {
    await work();
    setBusy(false);
  } catch (error) {
    if (error.name === "AbortError") return;
    setBusy(false);
    loaded = null;
    isLoading = false;
    instead(error.message, {isError: true, button: {text: "Try again", onclick: again}});
  }
}

const windowOf = () => ({from: state.from, to: state.to});
const momentsOf = () => ({known: state.known, stored: state.stored});
const isMoved = () => state.known !== null || state.stored !== null;

// load reads everything for what is ticked and the window.
function load() {
  const signal = supersede("picture");
  supersede("moment");
  writeLink();
  sayWindow();
  if (state.keys.length === 0) {
    setBusy(false);
    loaded = null;
    isLoading = false;
    setStops();
    instead("Tick one series or more. Series with the same unit share a pane.");
    return;
  }
  isLoading = true;
  attempt(async () => {
    const {keys} = state;
    const found = await about(keys, signal);
    const window = windowOf();
    const width = Math.max(200, $("stage").clientWidth);
    const [now, revisions] = await Promise.all([
      loadNow(keys, window, width, signal),
      state.revisions ? loadRevisions(keys, window, state.stored, signal) : new Map(),
    ]);
    const then = isMoved() ? await loadThen(keys, window, momentsOf(), now.bucket, signal) : now.rows;
    isLoading = false;
    loaded = {keys, window, bucket: now.bucket, now: now.rows, revisions, stored: state.stored, ...found};
    setStops();
    show(then);
  }, reload);
}

// loadMoment reads what changes when a moment moves. What runs said is another only by another "stored by".
function loadMoment() {
  if (isLoading) return load(); // which had begun with the moment before
  if (!loaded) return;
  const signal = supersede("moment");
  writeLink();
  attempt(async () => {
    const {keys, window, bucket} = loaded;
    const needsRevisions = state.revisions && loaded.stored !== state.stored;
    const [then, revisions] = await Promise.all([
      isMoved() ? loadThen(keys, window, momentsOf(), bucket, signal) : loaded.now,
      needsRevisions ? loadRevisions(keys, window, state.stored, signal) : loaded.revisions,
    ]);
    Object.assign(loaded, {revisions, stored: state.stored});
    show(then);
  }, reload);
}

function reload() {
  forget();
  load();
}

// ---- Showing

const seriesOf = (key) => catalog.find((one) => one.series_key === key);
const colorOf = (key) => colors.get(key) ?? "c0";

// giveColors keeps the color of what stays ticked. A new one gets that of its place in the list, or the next free one.
function giveColors() {
  for (const key of colors.keys()) if (!state.keys.includes(key)) colors.delete(key);
  for (const key of state.keys) {
    if (colors.has(key)) continue;
    const uses = Array.from(
      {length: COLORS},
      (_, i) => [...colors.values()].filter((color) => color === `c${i}`).length,
    );
    const own =
      Math.max(
        0,
        catalog.findIndex((one) => one.series_key === key),
      ) % COLORS;
    const order = uses.map((_, i) => (own + i) % COLORS);
    colors.set(key, `c${order.reduce((best, i) => (uses[i] < uses[best] ? i : best))}`);
  }
}

function domainOf(rows) {
  const {from, to} = windowOf();
  let {from: first, to: last} = closed({from, to}, extent(loaded.keys) ?? {from: 0, to: 1});
  if (to === null) for (const row of rows) if (row.e > last) last = row.e;
  return last - first > 1 ? {from: first, to: last} : {from: first - HOUR, to: last + HOUR};
}

function show(rows) {
  giveColors();
  const now = bySeries(loaded.now);
  const shown = bySeries(rows);
  const domain = domainOf(rows);
  const corrections = loaded.corrections.data.filter((row) => row.t >= domain.from && row.t < domain.to);
  const marks = bySeries(marksOf(corrections, loaded.runs.data, momentsOf()));
  const allMarks = bySeries(corrections);
  const usedColors = new Set();
  const series = loaded.keys.map((key) => {
    const color = colorOf(key);
    const allRuns = revisedIn(key, now.get(key) ?? []);
    const isDashed = usedColors.has(color);
    usedColors.add(color);
    return {
      key,
      unit: seriesOf(key)?.unit ?? "dimensionless",
      color,
      isDashed,
      allRuns,
      now: now.get(key) ?? [],
      shown: shown.get(key) ?? [],
      runs: allRuns.filter((run) => run.known < (state.known ?? Infinity)),
      marks: marks.get(key) ?? [],
      allMarks: allMarks.get(key) ?? [],
    };
  });
  if (loaded.now.length === 0 && rows.length === 0) {
    sayNothingThere();
    return;
  }
  picture = {
    ...domain,
    series,
    rows,
    bucket: loaded.bucket,
    moved: isMoved(),
    known: state.known,
    marks: [...marks.values()].flat(),
  };
  $("instead").hidden = true;
  $("canvas").hidden = false;
  plot.draw(picture);
  if (arriving !== null) plot.goTo(arriving);
  arriving = null;
  $("note").textContent = noteOf(rows);
  setTimeout(fillTabs); // the plot comes first
  requestAnimationFrame(() => setTimeout(() => performance.mark("drawn"))); // script/browser measures when it is seen
}

// revisedIn returns the runs of a series, or none if no run says anything anew: what is measured comes in a run a day.
function revisedIn(key, rows) {
  const runs = loaded.revisions?.get(key) ?? [];
  const values = runs.reduce((sum, run) => sum + run.t.length, 0);
  return !loaded.bucket && values <= rows.length ? [] : runs;
}

// sayNothingThere says where the data are.
function sayNothingThere() {
  const all = extent(loaded.keys);
  if (!all) {
    instead("Nothing is stored of these series yet. POST /upload adds values; the reference has an example.");
    return;
  }
  const {from, to} = closed(windowOf(), all);
  if (to <= all.from || from >= all.to) {
    const length = to > from ? to - from : all.to - all.from;
    const button = {text: "Show them", onclick: () => zoom(all.to - length, all.to)};
    const window = `${showTime(from)} and ${showTime(to)} ${zoneName()}`;
    instead(`No values of these series between ${window}. The latest are of ${showDate(all.to)}.`, {button});
  } else {
    const button = {text: "Show all of time", onclick: () => zoom(null, null)};
    instead("No values of these series here: what is stored is withdrawn, or lies elsewhere.", {button});
  }
}

function noteOf(rows) {
  const parts = [];
  if (loaded.bucket) {
    const count = rows.reduce((sum, row) => sum + row.count, 0);
    parts.push(
      `${many(count, "value")} as means over ${loaded.bucket}, least to greatest shaded; zoom in to see each`,
    );
  } else {
    parts.push(many(rows.length, "value"));
  }
  const corrected = picture.marks.length;
  if (corrected > 0) parts.push(`${many(corrected, "correction")} ringed`);
  if (state.revisions && loaded.revisions === null) parts.push("revisions are too many to draw: zoom in");
  if (rows.length === 0) parts.push("nothing was there then");
  if (picture.moved) parts.push("the pale broken line is what is there now");
  return `${parts.join(" · ")}.`;
}

function sayWindow() {
  const {from, to} = windowOf();
  $("from").value = from === null ? "" : showTime(from);
  $("to").value = to === null ? "" : showTime(to);
  const isBound = from !== null || to !== null;
  $("span-said").textContent = isBound ? `${$("from").value || "…"} → ${$("to").value || "…"}` : "all of time";
  for (const button of document.querySelectorAll("[data-range]")) {
    const {range} = button.dataset;
    const isIt = range === "all" ? from === null && to === null : from !== null && to - from === range * HOUR;
    button.setAttribute("aria-pressed", String(isIt));
  }
}

// ---- Tabs

const tables = {};
function makeTables() {
  tables.values = new Table($("panel-values"), "Values", (row) => plot.goTo(row.t));
  tables.corrections = new Table($("corrections-table"), "Corrections", (row) => visit(row));
  tables.runs = new Table($("runs-table"), "Runs", (run) => plot.showRun(run.known));
  tables.lead = new Table($("lead-table"), "Error by lead time");
}

// fillTabs fills the open tab, and says in the others' names how much there is.
function fillTabs() {
  const corrections = loaded?.corrections.data.length ?? 0;
  const runs = loaded?.runs.data.length ?? 0;
  $("tab-corrections").textContent = corrections
    ? `Corrections ${corrections}${loaded.corrections.more ? "+" : ""}`
    : "Corrections";
  $("tab-runs").textContent = runs ? `Runs ${runs}${loaded.runs.more ? "+" : ""}` : "Runs";
  ({values: fillValues, corrections: fillCorrections, runs: fillRuns, lead: fillLead, code: showCode})[
    state.tab
  ]();
}

function fillValues() {
  if (!picture) return tables.values.fill([], []);
  const rows = picture.series.length > 1 ? picture.rows.toSorted((a, b) => a.t - b.t) : picture.rows;
  tables.values.fill(valueColumns(picture, colorOf, askCorrection), rows);
}

const isMade = (row) => row.changed <= (state.stored ?? Infinity) && row.known < (state.known ?? Infinity);

function fillCorrections() {
  const list = loaded?.corrections.data ?? [];
  $("previous").disabled = $("next").disabled = list.length === 0;
  const counted = list.filter(isMade).length;
  let text = "No value of these series was corrected. Click a point in the plot to correct it.";
  if (list.length > 0) text = `${many(counted, "correction")} of these series, the newest first.`;
  if (loaded?.corrections.more) text += " Older ones are not listed.";
  if (counted < list.length) text += ` ${list.length - counted} later than the moments chosen are struck out.`;
  $("corrections-said").textContent = text;
  tables.corrections.fill(list.length ? correctionColumns(colorOf) : [], list, (row) =>
    isMade(row) ? "" : "off",
  );
}

function fillRuns() {
  const list = loaded?.runs.data ?? [];
  const counting = list.filter((run) => standing(run, momentsOf()) === "counts").length;
  let text = "No runs: an upload makes one.";
  if (list.length > 0) text = `${counting} of ${many(list.length, "run")} count at these moments.`;
  if (loaded?.runs.more) text += " Older ones are not listed.";
  $("runs-said").textContent = text;
  const columns = runColumns(momentsOf(), picture ? shownOf(picture) : new Map(), askWithdrawal);
  tables.runs.fill(list.length > 0 ? columns : [], list, (run) =>
    standing(run, momentsOf()) === "counts" ? "" : "off",
  );
}

function fillLead() {
  const series = picture?.series ?? [];
  const stop = (text) => {
    $("lead-said").textContent = text;
    $("lead-plot").replaceChildren();
    tables.lead.fill([], []);
  };
  fillChoices(series);
  if (series.length < 2) return stop("Tick a forecast and the series that was measured.");
  if (picture.bucket || !loaded.revisions || !state.revisions) {
    return stop("Needs single values and their revisions: zoom in, and tick Revisions.");
  }
  const forecast = series.find((one) => one.key === $("forecast").value);
  const measured = series.find((one) => one.key === $("measured").value);
  const errors = errorsByLead(runsOf(forecast), measured.now);
  if (errors.bins.length === 0) return stop("The two have no valid time in common.");
  const count = errors.bins.reduce((sum, bin) => sum + bin.count, 0);
  let text = `${many(count, "value")} of ${many(Math.max(1, forecast.runs.length), "run")}.`;
  if (forecast.unit !== measured.unit) text += ` Mind the units: ${forecast.unit} and ${measured.unit}.`;
  $("lead-said").textContent = text;
  drawErrors($("lead-plot"), errors, forecast.unit, forecast.color);
  tables.lead.fill(errorColumns(errors.width, forecast.unit), errors.bins);
}

// requestOf is the request for the lines of the picture.
const requestOf = () => lineParameters(state.keys, windowOf(), momentsOf(), loaded?.bucket ?? "");

const showCode = () => fillCode(requestOf());

// visit shows a correction: in the window that there is, or in one around it.
function visit(row) {
  tables.corrections.select(row);
  const {from, to} = picture ?? {from: 0, to: 0};
  if (row.t >= from && row.t < to) {
    plot.goTo(row.t);
    return;
  }
  const half = Math.max(HOUR, (to - from) / 2 || 3 * DAY);
  arriving = row.t;
  zoom(Math.floor(row.t - half), Math.ceil(row.t + half));
}

// step visits the next correction in valid time, or the one before.
function step(direction) {
  const list = (loaded?.corrections.data ?? []).filter(isMade).sort((a, b) => a.t - b.t);
  if (list.length === 0) return;
  const at = list.indexOf(tables.corrections.selected);
  visit(list.at(at < 0 ? (direction > 0 ? 0 : -1) : (at + direction) % list.length));
}

function askCorrection(row) {
  if (state.stored !== null) {
    $("note").textContent = "A correction is made now: set “Stored by” back to now.";
    return;
  }
  if (loaded.bucket)
    return zoom(row.t, Math.max(row.t + HOUR, picture.rows.find((other) => other.t > row.t)?.t ?? 0));
  correct(row, reload);
}

function askWithdrawal(run) {
  withdraw(run, reload);
}

// ---- The window

function zoom(from, to) {
  past.push(windowOf());
  Object.assign(state, {from, to});
  load();
}

function back() {
  const window = past.pop();
  if (!window) return;
  Object.assign(state, window);
  load();
}

function move(part) {
  if (!picture) return;
  const by = Math.round((picture.to - picture.from) * part);
  zoom(picture.from + by, picture.to + by);
}

// chooseRange shows the last hours of what there is, which may end long before today, or ahead of it. The end is a full
// hour, or a full day where the window is long.
function chooseRange(range) {
  const all = loaded && extent(loaded.keys);
  if (range === "all" || !all) return zoom(null, null);
  const unit = range > 24 * 7 ? DAY : HOUR;
  const end = Math.ceil(all.to / unit) * unit;
  zoom(end - range * HOUR, end);
}

// ---- The two moments

const moments = {};
function makeMoments() {
  const onMove = () => later(loadMoment, SLIDING);
  moments.known = new Moment("known", state, onMove, (time) => {
    if (time === null) return "Everything that is known now. Move it to see what had been forecast by then.";
    return `What was known before ${showTime(time)} ${zoneName()}: only runs with an earlier known_time.`;
  });
  moments.stored = new Moment("stored", state, onMove, (time) => {
    if (time === null) return "Everything that is stored now. Move it to see what this database held by then.";
    const moment = `${showTime(time)} ${zoneName()}`;
    return `What this database held at ${moment}: later uploads, corrections and withdrawals are undone.`;
  });
}

// setStops tells the sliders which moments there are: when runs were known; when runs, corrections and withdrawals came.
function setStops() {
  const runs = loaded?.runs.data ?? [];
  const withdrawals = runs.map((run) => run.withdrawn).filter((time) => time !== null);
  moments.known.setStops(runs.map((run) => run.known));
  const corrections = (loaded?.corrections.data ?? []).map((row) => row.changed);
  moments.stored.setStops([...runs.map((run) => run.stored), ...corrections, ...withdrawals]);
}

// ---- The list of series

function fillSeries() {
  const part = $("find").value.trim().toLowerCase();
  const found = catalog.filter((one) => one.series_key.toLowerCase().includes(part));
  const ticked = found.filter((one) => state.keys.includes(one.series_key));
  const listed = new Set([...ticked, ...found].slice(0, MOST_LISTED));
  giveColors();
  $("series").replaceChildren(
    ...found
      .filter((one) => listed.has(one))
      .map((one) => {
        const isTicked = state.keys.includes(one.series_key);
        const box = el("input", {
          type: "checkbox",
          value: one.series_key,
          checked: isTicked,
          onchange: (event) => tick(one.series_key, event.target.checked),
        });
        const unit = one.unit === "dimensionless" ? "" : one.unit;
        return el(
          "li",
          {class: isTicked ? colorOf(one.series_key) : false},
          el(
            "label",
            {title: one.description ?? undefined},
            box,
            el("span", {}, one.series_key),
            el("small", {}, unit),
          ),
        );
      }),
  );
  sayTicked();
  let text = found.length === 0 ? "None is called so." : "";
  if (found.length > listed.size)
    text = `${listed.size} of ${many(found.length, "series", "series")}: find more by name.`;
  $("series-said").textContent = text;
}

function sayTicked() {
  $("side-said").textContent = `Series: ${state.keys.length} of ${catalog.length}`;
}

// tick changes what is chosen. The list stays as it is, so that the focus does too; only colors follow.
function tick(key, isTicked) {
  state.keys = isTicked ? [...state.keys, key] : state.keys.filter((other) => other !== key);
  giveColors();
  for (const item of $("series").children) {
    const box = item.querySelector("input");
    box.checked = state.keys.includes(box.value);
    item.className = box.checked ? colorOf(box.value) : "";
  }
  sayTicked();
  later(load, TICKING);
}

// ---- The key

async function login(event) {
  event.preventDefault();
  const signal = supersede("login");
  supersede("picture");
  supersede("moment");
  setBusy(false);
  leaveNothing();
  $("key").placeholder = "tdb_…";
  say("Reading…");
  try {
    useKey($("key").value);
    const found = await get("list_timeseries", {}, signal);
    catalog = Object.entries(found).map(([id, one]) => ({series_id: id, ...one}));
    $("key").value = ""; // from now on one module has it, and no field that a browser might keep
    $("key").placeholder = "in use";
    enter();
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  }
  showExamples(catalog, state.keys);
}

// leaveNothing takes away whatever was read with another key.
function leaveNothing() {
  forget();
  forgetExamples();
  catalog = [];
  loaded = null;
  isLoading = false;
  colors.clear();
  past.length = 0;
  $("workspace").hidden = true;
  $("intro").hidden = false;
  instead("");
  for (const table of Object.values(tables)) table.fill([], []);
  const filled = [
    "series",
    "lead-plot",
    "forecast",
    "measured",
    "tip",
    "curl",
    "pandas",
    "readout",
    "correct-what",
    "withdraw-what",
  ];
  for (const id of filled) $(id).replaceChildren();
}

function enter() {
  state.keys = state.keys.filter((key) => seriesOf(key));
  writeLink();
  if (catalog.length === 0) {
    say(
      "The key is good, and its tenant has no series yet. POST /upload makes one: the reference has an example to send.",
    );
    return;
  }
  $("intro").hidden = true;
  $("workspace").hidden = false;
  fillSeries();
  load();
}

// ---- Wiring

const plot = new Plot($("plot"), {
  point: (row) => {
    if (state.tab === "values") tables.values?.select(row);
  },
  choose: (row) => askCorrection(row),
  zoom,
  back,
  move,
  remove: (key) => tick(key, false),
});

async function copy(button, text) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Copy it by hand"; // the browser does not allow it, as on plain HTTP
  }
  setTimeout(() => {
    button.textContent = before;
  }, 2000);
}

async function download() {
  const button = $("download");
  button.disabled = true;
  try {
    const blob = await getBlob("values", [...requestOf(), ["format", "csv"]]);
    const link = el("a", {href: URL.createObjectURL(blob), download: "timedb.csv"});
    link.click();
    URL.revokeObjectURL(link.href);
  } catch (error) {
    $("note").textContent = error.message;
  }
  button.disabled = false;
}

function wire() {
  $("login").addEventListener("submit", login);
  $("find").addEventListener("input", fillSeries);
  $("zone").addEventListener("change", () => {
    state.zone = $("zone").value;
    setZone(state.zone);
    load();
  });
  $("revisions").addEventListener("change", () => {
    state.revisions = $("revisions").checked;
    load();
  });
  $("span-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const [from, to] = [timeIn($("from")), timeIn($("to"))];
    if (from === undefined || to === undefined) return;
    $("span").open = false;
    zoom(from, to);
  });
  for (const button of document.querySelectorAll("[data-range]"))
    button.addEventListener("click", () => chooseRange(button.dataset.range));
  for (const button of document.querySelectorAll("[data-copies]")) {
    button.addEventListener("click", () => copy(button, $(button.dataset.copies).textContent));
  }
  $("refresh").addEventListener("click", reload);
  $("copy-link").addEventListener("click", () => copy($("copy-link"), location.href));
  $("download").addEventListener("click", download);
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  for (const name of ["forecast", "measured"]) $(name).addEventListener("change", fillLead);
  initTabs((name) => {
    state.tab = name;
    openTab(name);
    writeLink();
    fillTabs();
  });
  addEventListener("hashchange", () => {
    const before = JSON.stringify({...state, view: ""});
    readLink();
    showView();
    if (catalog.length > 0 && JSON.stringify({...state, view: ""}) !== before) enter();
  });
}

makeTables();
makeMoments();
wire();
readLink();
if (matchMedia("(max-width: 44rem)").matches) $("side").open = false;
initReference().then(showView);
showView();
