// The error of a forecast by lead time: how far from what was measured later, by how long before it was said.

import {$, el} from "./api.js";
import {HOUR, digits, inUnit, many, numberTicks, showSpan} from "./times.js";

const MOST_BINS = 48;
const WIDTHS = [0.25, 0.5, 1, 3, 6, 12, 24, 48, 168, 720].map((hours) => hours * HOUR);
const HEIGHT = 220;
const PAD = {left: 64, right: 16, top: 12, bottom: 36};

// errorsByLead compares every value of every run of a forecast with what was measured of the same valid time. It returns
// bins of lead time: {lead, count, mean absolute error, bias}.
export function errorsByLead(runs, measured) {
  const actual = new Map(measured.filter((row) => row.value !== null).map((row) => [row.t, row.value]));
  const errors = [];
  for (const run of runs) {
    run.t.forEach((t, i) => {
      if (run.v[i] !== null && actual.has(t))
        errors.push({lead: t - run.known, error: run.v[i] - actual.get(t)});
    });
  }
  if (errors.length === 0) return {width: 0, bins: []};
  const leads = errors.map((one) => one.lead);
  const reach = leads.reduce((a, b) => Math.max(a, b)) - leads.reduce((a, b) => Math.min(a, b));
  const width = WIDTHS.find((w) => reach / w <= MOST_BINS) ?? WIDTHS.at(-1);
  const bins = new Map();
  for (const {lead, error} of errors) {
    const begin = Math.floor(lead / width) * width;
    if (!bins.has(begin)) bins.set(begin, {lead: begin, count: 0, sum: 0, absolute: 0});
    const bin = bins.get(begin);
    bin.count++;
    bin.sum += error;
    bin.absolute += Math.abs(error);
  }
  const sorted = [...bins.values()].sort((a, b) => a.lead - b.lead);
  return {
    width,
    bins: sorted.map((bin) => ({
      lead: bin.lead,
      count: bin.count,
      error: bin.absolute / bin.count,
      bias: bin.sum / bin.count,
    })),
  };
}

// runsOf are the runs of a series. Where there is only one, its values are the line that is drawn.
export function runsOf(series) {
  if (series.allRuns.length > 0) return series.runs;
  return series.shown.map((row) => ({known: Date.parse(row.known_time), t: [row.t], v: [row.value]}));
}

// drawErrors draws the mean absolute error as bars and the bias as a line.
export function drawErrors(place, {width, bins}, unit, color) {
  const right = place.clientWidth - PAD.right;
  const bottom = HEIGHT - PAD.bottom;
  const first = bins[0].lead;
  const last = bins.at(-1).lead + width;
  const hi = Math.max(...bins.map((bin) => bin.error)) * 1.08 || 1;
  const lo = Math.min(0, ...bins.map((bin) => bin.bias)) * 1.08;
  const x = (lead) => PAD.left + ((lead - first) / (last - first)) * (right - PAD.left);
  const y = (value) => bottom - ((value - lo) / (hi - lo)) * (bottom - PAD.top);
  const grid = numberTicks(lo, hi, 4).flatMap((tick) => [
    el("svg:line", {class: "grid", x1: PAD.left, x2: right, y1: y(tick), y2: y(tick)}),
    el("svg:text", {x: PAD.left - 8, y: y(tick) + 4, "text-anchor": "end"}, digits(tick)),
  ]);
  const every = Math.ceil(bins.length / Math.max(2, (right - PAD.left) / 64));
  const labels = bins
    .filter((bin, i) => i % every === 0)
    .map((bin) =>
      el("svg:text", {x: x(bin.lead), y: bottom + 16, "text-anchor": "middle"}, showSpan(bin.lead)),
    );
  const bars = bins.map((bin) =>
    el(
      "svg:rect",
      {
        class: "bar",
        x: x(bin.lead) + 1,
        width: Math.max(1, x(bin.lead + width) - x(bin.lead) - 2),
        y: y(bin.error),
        height: Math.max(0, y(0) - y(bin.error)),
      },
      el(
        "svg:title",
        {},
        `${showSpan(bin.lead)} ahead: ${digits(bin.error)}${inUnit(unit)} of ${many(bin.count, "value")}`,
      ),
    ),
  );
  const bias = bins.map((bin) => `${x(bin.lead + width / 2).toFixed(1)} ${y(bin.bias).toFixed(1)}`).join("L");
  const axis = el("svg:line", {class: "axis", x1: PAD.left, x2: right, y1: y(0), y2: y(0)});
  const legend = el(
    "svg:text",
    {x: right, y: HEIGHT - 4, "text-anchor": "end"},
    "lead time: bars are the mean absolute error, the line the bias",
  );
  place.replaceChildren(
    el(
      "svg:svg",
      {
        width: place.clientWidth,
        height: HEIGHT,
        role: "img",
        "aria-label": "Error by lead time; the table below has the numbers",
      },
      ...grid,
      el("svg:g", {class: color}, ...bars, el("svg:path", {class: "flat", d: `M${bias}`})),
      axis,
      ...labels,
      legend,
    ),
  );
}

export const errorColumns = (width, unit) => [
  {name: "lead time", width: 20, of: (bin) => `${showSpan(bin.lead)} to ${showSpan(bin.lead + width)}`},
  {name: `mean absolute error${inUnit(unit)}`, width: 26, isNumber: true, of: (bin) => digits(bin.error)},
  {name: `bias${inUnit(unit)}`, width: 20, isNumber: true, of: (bin) => digits(bin.bias)},
  {name: "values", width: 12, isNumber: true, of: (bin) => String(bin.count)},
];

// fillChoices offers series as forecast and as measured, and keeps what was chosen while it is there. At first the one
// with more runs is the forecast, and one in the same unit is what was measured.
export function fillChoices(series) {
  const byRuns = [...series].sort((a, b) => b.allRuns.length - a.allRuns.length).map((one) => one.key);
  const choose = (select, preferred) => {
    const before = select.value;
    select.replaceChildren(...series.map((one) => el("option", {value: one.key}, one.key)));
    select.value = series.some((one) => one.key === before) ? before : (preferred ?? "");
  };
  choose($("forecast"), byRuns[0]);
  const unitOf = (key) => series.find((one) => one.key === key)?.unit;
  const others = byRuns.filter((key) => key !== $("forecast").value);
  choose($("measured"), others.findLast((key) => unitOf(key) === unitOf($("forecast").value)) ?? others.at(-1));
}
