// From what is chosen to what can be drawn: which requests to send, and what their rows mean.

import {get} from "./api.js";
import {DAY, HOUR, iso, isLocal, zoneName} from "./times.js";

export const MOST_POINTS = 12000; // that are drawn one by one; of more the server makes buckets
export const MOST_REVISED = 80000; // rows of revisions that are asked for
export const MOST_LINES = 30; // runs that are drawn as lines; more are a band
const MOST_RUNS = 2000; // in the list, the newest known
const MOST_CORRECTIONS = 2000; // in the list, the newest made
const MOST_OWN_RUNS = 4; // series whose runs are asked for one by one; beyond, all runs are listed
const MOST_PATTERNS = 20; // of match, which the server bounds

// Lengths of buckets. Those of a day or more follow the calendar.
const BUCKETS = [
  ["PT1S", 1e3],
  ["PT5S", 5e3],
  ["PT15S", 15e3],
  ["PT1M", 60e3],
  ["PT5M", 300e3],
  ["PT15M", 900e3],
  ["PT30M", 1800e3],
  ["PT1H", HOUR],
  ["PT3H", 3 * HOUR],
  ["PT6H", 6 * HOUR],
  ["PT12H", 12 * HOUR],
  ["P1D", DAY],
  ["P1W", 7 * DAY],
  ["P1M", 31 * DAY],
  ["P3M", 92 * DAY],
  ["P1Y", 366 * DAY],
  ["P10Y", 3660 * DAY],
];

// ---- What is known of series before their values are read

// The answers that stay good until something is written, by series key ("" is all series).
const known = {stats: new Map(), runs: new Map(), corrections: new Map()};

export function forget() {
  for (const answers of Object.values(known)) answers.clear();
}

// about asks for what is not known yet of the series: what is stored of them, their runs, their corrections.
export async function about(keys, signal) {
  const [, runs, corrections] = await Promise.all([
    statsOf(keys, signal),
    runsOf(keys, signal),
    correctionsOf(keys, signal),
  ]);
  return {runs, corrections};
}

// writtenAt is the first millisecond at which something was there: the server compares with microseconds.
function writtenAt(text) {
  const micros = /\.\d{3}(\d{3})/.exec(text)?.[1] ?? "000";
  return Date.parse(text) + (micros === "000" ? 0 : 1);
}

async function statsOf(keys, signal) {
  const missing = keys.filter((key) => !known.stats.has(key));
  if (missing.length === 0) return;
  const patterns = missing.length > MOST_PATTERNS ? [] : missing.map((key) => ["match", key]);
  const found = await get("list_timeseries", [["stats", "true"], ...patterns], signal);
  for (const one of Object.values(found)) known.stats.set(one.series_key, one);
}

async function runsOf(keys, signal) {
  const lists = keys.length > MOST_OWN_RUNS ? [""] : keys;
  await Promise.all(
    lists
      .filter((key) => !known.runs.has(key))
      .map(async (key) => {
        const parameters = [["limit", MOST_RUNS], ...(key ? [["series_key", key]] : [])];
        const answer = await get("runs", parameters, signal);
        for (const run of answer.data) {
          run.known = Date.parse(run.known_time);
          run.stored = writtenAt(run.inserted_at);
          run.withdrawn = run.withdrawn_at ? writtenAt(run.withdrawn_at) : null;
        }
        known.runs.set(key, answer);
      }),
  );
  const all = new Map();
  for (const list of lists) for (const run of known.runs.get(list).data) all.set(run.run_id, run);
  const data = [...all.values()].sort((a, b) => b.known - a.known);
  return {data, more: lists.some((list) => known.runs.get(list).more)};
}

async function correctionsOf(keys, signal) {
  const name = JSON.stringify(keys.toSorted());
  if (!known.corrections.has(name)) {
    const answer = await get(
      "corrections",
      [["limit", MOST_CORRECTIONS], ...keys.map((key) => ["series_key", key])],
      signal,
    );
    for (const row of answer.data) {
      row.t = Date.parse(row.valid_time);
      row.e = row.valid_time_end ? Date.parse(row.valid_time_end) : null;
      row.changed = writtenAt(row.change_time);
      row.known = Date.parse(row.known_time);
    }
    known.corrections.set(name, answer);
  }
  return known.corrections.get(name);
}

// extent is from the first to behind the last valid time that is stored of the series, or null where nothing is.
export function extent(keys) {
  const stored = keys.map((key) => known.stats.get(key)).filter((one) => one?.values > 0);
  if (stored.length === 0) return null;
  const firsts = stored.map((one) => Date.parse(one.first_valid_time));
  const lasts = stored.map((one) => Date.parse(one.last_valid_time));
  return {from: Math.min(...firsts), to: Math.max(...lasts) + 1};
}

// storedIn estimates how many values of all runs and versions a window has, as if they were spread evenly.
function storedIn(keys, window) {
  let sum = 0;
  for (const key of keys) {
    const one = known.stats.get(key);
    if (!one?.values) continue;
    const first = Date.parse(one.first_valid_time);
    const last = Date.parse(one.last_valid_time) + 1;
    const common = Math.min(last, window.to) - Math.max(first, window.from);
    sum += (one.values * Math.max(0, common)) / (last - first);
  }
  return sum;
}

// closed gives a window the ends of all where it has none of its own.
export const closed = (window, all) => ({from: window.from ?? all.from, to: window.to ?? all.to});

// ---- Values

// bounds are the parameters of a window and of the two moments, where they bound anything.
export function bounds({from, to}, {known: before, stored} = {}) {
  const parameters = [];
  if (Number.isFinite(from)) parameters.push(["start_valid", iso(from)]);
  if (Number.isFinite(to)) parameters.push(["end_valid", iso(to)]);
  if (Number.isFinite(before)) parameters.push(["end_known", iso(before)]);
  if (Number.isFinite(stored)) parameters.push(["as_of", iso(stored)]);
  return parameters;
}

// bucketFor returns the shortest length that leaves no more buckets than there is room for.
function bucketFor(keys, window, width) {
  const room = Math.min(width, MOST_POINTS / keys.length);
  return (BUCKETS.find(([, length]) => (window.to - window.from) / length <= room) ?? BUCKETS.at(-1))[0];
}

// lineParameters is the one request for all lines of a picture, and for the exact values behind them.
export function lineParameters(keys, window, moments, bucket) {
  const parameters = [...keys.map((key) => ["series_key", key]), ...bounds(window, moments)];
  if (!bucket) return [...parameters, ["detail", "true"]];
  parameters.push(["bucket", bucket], ...["mean", "min", "max", "count"].map((agg) => ["agg", agg]));
  if (isLocal() && /^P\d/.test(bucket)) parameters.push(["tz", zoneName()]);
  return parameters;
}

// understand adds to rows what is drawn of them.
function understand(rows, bucket) {
  for (const row of rows) {
    row.t = Date.parse(row.valid_time);
    row.e = row.valid_time_end ? Date.parse(row.valid_time_end) : null;
    if (bucket) row.value = row.mean;
  }
  return rows;
}

async function linesIn(keys, window, moments, bucket, signal) {
  const limit = bucket ? [] : [["limit", MOST_POINTS]];
  const answer = await get("values", [...lineParameters(keys, window, moments, bucket), ...limit], signal);
  return {rows: understand(answer.data, bucket), more: answer.more};
}

// loadNow reads what is known now: single values if there are few, else buckets.
export async function loadNow(keys, window, width, signal) {
  const all = extent(keys);
  if (!all) return {bucket: "", rows: []};
  const bounded = closed(window, all);
  if (storedIn(keys, bounded) <= MOST_POINTS) {
    const single = await linesIn(keys, window, {}, "", signal);
    if (!single.more) return {bucket: "", rows: single.rows};
  }
  const bucket = bucketFor(keys, bounded, width);
  const {rows} = await linesIn(keys, window, {}, bucket, signal);
  // What is stored may be mostly revisions, and what they leave few.
  if (rows.reduce((sum, row) => sum + row.count, 0) > MOST_POINTS) return {bucket, rows};
  const single = await linesIn(keys, window, {}, "", signal);
  return single.more ? {bucket, rows} : {bucket: "", rows: single.rows};
}

// loadThen reads what was known, and stored, by the two moments. What was more then than is now must not look complete.
export async function loadThen(keys, window, moments, bucket, signal) {
  const {rows, more} = await linesIn(keys, window, moments, bucket, signal);
  if (more) throw new Error(`There were more than ${MOST_POINTS} values then: zoom in to see them.`);
  return rows;
}

// loadRevisions reads what every run says, stored by a moment; null means that it is too much to draw. What came in one run
// has no revisions.
export async function loadRevisions(chosen, window, stored, signal) {
  const keys = chosen.filter((key) => known.runs.get(key)?.data.length !== 1);
  if (keys.length === 0) return new Map();
  const all = extent(keys);
  if (!all || storedIn(keys, closed(window, all)) > MOST_REVISED * 1.5) return null;
  const parameters = [
    ...keys.map((key) => ["series_key", key]),
    ...bounds(window, {stored}),
    ["mode", "overlapping"],
    ["limit", MOST_REVISED],
  ];
  const answer = await get("values", parameters, signal);
  return answer.more ? null : revisionsOf(answer.data);
}

// revisionsOf returns by series_key the runs, in the order in which they became known, each with its times and values.
// Rows come in that order. Two runs may be known at one time: what repeats a valid time begins another line.
function revisionsOf(rows) {
  const bySeries = new Map();
  let open = [];
  let last = null;
  for (const row of rows) {
    if (row.series_key !== last?.series_key) bySeries.set(row.series_key, []);
    if (row.series_key !== last?.series_key || row.known_time !== last.known_time) open = [];
    let run = open.find((one) => one.latest < row.valid_time);
    if (!run) {
      run = {known: Date.parse(row.known_time), t: [], e: [], v: []};
      open.push(run);
      bySeries.get(row.series_key).push(run);
    }
    run.latest = row.valid_time;
    run.t.push(Date.parse(row.valid_time));
    run.e.push(row.valid_time_end ? Date.parse(row.valid_time_end) : null);
    run.v.push(row.value);
    last = row;
  }
  return bySeries;
}

// bandOf is, for each valid time, what lies between the least and the greatest of all runs.
export function bandOf(runs) {
  const ends = new Map();
  for (const run of runs) {
    run.t.forEach((t, i) => {
      const value = run.v[i];
      const at = ends.get(t);
      if (value === null) return;
      if (!at) ends.set(t, {t, e: run.e[i], min: value, max: value});
      else if (value < at.min) at.min = value;
      else if (value > at.max) at.max = value;
    });
  }
  return [...ends.values()].sort((a, b) => a.t - b.t);
}

// bySeries splits rows, which come in the order of their series.
export function bySeries(rows) {
  const lists = new Map();
  for (const row of rows) {
    if (!lists.has(row.series_key)) lists.set(row.series_key, []);
    lists.get(row.series_key).push(row);
  }
  return lists;
}

// ---- Runs and corrections at two moments

// standing says whether a run counts at the moments, or why not.
export function standing(run, {known: before, stored}) {
  if (Number.isFinite(before) && run.known >= before) return "not known yet";
  if (Number.isFinite(stored) && run.stored > stored) return "not stored yet";
  if (run.withdrawn !== null && run.withdrawn <= (stored ?? Infinity)) return "withdrawn";
  return "counts";
}

// marksOf returns the corrections that count at the moments: of each value of a run the last one.
export function marksOf(corrections, runs, {known: before, stored}) {
  const withdrawn = new Set(
    runs.filter((run) => standing(run, {stored}) === "withdrawn").map((run) => run.run_id),
  );
  const last = new Map();
  for (const row of corrections) {
    // the newest come first
    const isMade = row.changed <= (stored ?? Infinity) && row.known < (before ?? Infinity);
    const place = [row.series_id, row.run_id, row.valid_time, row.valid_time_end].join(" ");
    if (isMade && !withdrawn.has(row.run_id) && !last.has(place)) last.set(place, row);
  }
  return [...last.values()];
}

export function kindOf(correction) {
  if (correction.value === null) return "to null";
  return correction.old_value === null ? "added" : "changed";
}
