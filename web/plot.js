// The plot: a pane for each unit, one above the other, over one axis of time. It is told what to draw, and tells which
// value is pointed at, which was chosen, and which span of time was dragged over.

import {$, el} from "./api.js";
import {MOST_LINES, bandOf, kindOf} from "./picture.js";
import {digits, inUnit, many, numberTicks, showTime, timeTicks, zoneName} from "./times.js";

const PAD = {top: 10, right: 16, bottom: 26};
const LETTER = 7; // pixels of a letter below the plot, or a little less
const NEAR = 12; // pixels within which something is pointed at
const FEW = 14; // pixels between values that leave room for a dot on each
const LEAST_DRAG = 6; // pixels; less is a click
const TWICE = 300; // milliseconds in which a click may become a double click

export class Plot {
  // on has the functions point(row), choose(row), zoom(from, to), back(), move(part of the window), remove(series_key).
  constructor(root, on) {
    this.root = root;
    this.on = on;
    this.picture = null;
    this.cursor = null; // {t, entries}
    this.alone = null; // the run that is shown alone: {key, run}
    this.tip = $("tip");
    root.addEventListener("pointermove", (event) => this.#pointerMoved(event));
    root.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse") this.#pointerLeft();
    });
    root.addEventListener("pointerdown", (event) => this.#pressed(event));
    root.addEventListener("pointerup", (event) => this.#released(event));
    root.addEventListener("pointercancel", () => {
      this.drag = null;
      this.#drawOver();
    });
    root.addEventListener("dblclick", (event) => this.#clickedTwice(event));
    root.addEventListener("keydown", (event) => this.#keyed(event));
    new ResizeObserver(() => this.draw(this.picture)).observe(root);
  }

  clear() {
    clearTimeout(this.clicked);
    this.picture = null;
    this.cursor = null;
    this.alone = null;
    this.tip.hidden = true;
    this.root.replaceChildren();
  }

  // draw shows a picture: {from, to, moved, known, bucket, series: [{key, unit, color, now, shown, runs, allRuns, marks, allMarks}]}.
  draw(picture) {
    this.picture = picture;
    this.alone = null;
    if (!picture || this.root.clientWidth < 100) return;
    const units = [...new Set(picture.series.map((one) => one.unit))];
    this.panes = units.map((unit) => ({unit, series: picture.series.filter((one) => one.unit === unit)}));
    const height = this.#height();
    this.panes.forEach((pane, i) => {
      pane.height = Math.max(110, Math.round(height * shareOf(i, units.length)));
      pane.range = rangeOf(pane.series);
      pane.ticks = numberTicks(...pane.range, pane.height / 48);
    });
    const longest = Math.max(...this.panes.flatMap((pane) => pane.ticks.map((tick) => digits(tick).length)));
    this.left = Math.max(48, 16 + LETTER * longest);
    this.right = this.root.clientWidth - PAD.right;
    this.root.replaceChildren(
      ...this.panes.map((pane, i) => this.#drawPane(pane, i === this.panes.length - 1)),
    );
    const isUsed = this.root.matches(":hover") || document.activeElement === this.root;
    if (this.cursor && isUsed) this.#pointAt(this.cursor.t);
    else this.#pointerLeft();
  }

  #height() {
    const most = innerWidth < 700 ? innerHeight * 0.5 : innerHeight * 0.46;
    return Math.min(620, Math.max(260, most));
  }

  x(time) {
    const {from, to} = this.picture;
    return this.left + ((time - from) / (to - from)) * (this.right - this.left);
  }

  time(x) {
    const {from, to} = this.picture;
    const part = (x - this.left) / (this.right - this.left);
    return from + Math.min(1, Math.max(0, part)) * (to - from);
  }

  #drawPane(pane, isLast) {
    const {
      height,
      range: [lo, hi],
    } = pane;
    const bottom = height - PAD.bottom;
    pane.bottom = bottom;
    pane.y = (value) => bottom - ((value / 4 - lo / 4) / (hi / 4 - lo / 4)) * (bottom - PAD.top);
    const clip = `clip${this.panes.indexOf(pane)}`;
    pane.clip = `url(#${clip})`;
    const body = el(
      "svg:g",
      {"clip-path": pane.clip},
      ...pane.series.map((one) => this.#drawSeries(one, pane)),
    );
    pane.over = el("svg:g", {class: "over"});
    pane.svg = el(
      "svg:svg",
      {width: this.root.clientWidth, height, "aria-hidden": "true"},
      el(
        "svg:clipPath",
        {id: clip},
        el("svg:rect", {x: this.left - 1, y: 0, width: this.right - this.left + 2, height: bottom + 1}),
      ),
      ...this.#drawAxes(pane, isLast),
      body,
      pane.over,
    );
    const chips = pane.series.map((one) =>
      el(
        "li",
        {class: `chip ${one.color}`},
        el("span", {class: "dot", "aria-hidden": "true"}),
        one.key,
        el(
          "button",
          {
            type: "button",
            "aria-label": `Remove ${one.key}`,
            title: "Remove",
            onclick: () => this.on.remove(one.key),
          },
          "×",
        ),
      ),
    );
    const unit = pane.unit === "dimensionless" ? "no unit" : pane.unit;
    return el(
      "div",
      {class: "pane"},
      el("div", {class: "head"}, el("b", {class: "unit"}, unit), el("ul", {class: "chips"}, ...chips)),
      pane.svg,
    );
  }

  #drawAxes(pane, isLast) {
    const isFirst = pane === this.panes[0];
    const parts = [];
    for (const tick of pane.ticks) {
      const y = pane.y(tick);
      parts.push(
        el("svg:line", {class: "grid", x1: this.left, x2: this.right, y1: y, y2: y}),
        el("svg:text", {x: this.left - 8, y: y + 4, "text-anchor": "end"}, digits(tick)),
      );
    }
    const {from, to} = this.picture;
    const end = this.right + 8 - (isLast ? zoneName().length * LETTER + 8 : 0);
    let free = this.left - 8; // where there is room for a label
    for (const {time, label} of timeTicks(from, to, (this.right - this.left) / (this.right < 500 ? 64 : 96))) {
      const x = this.x(time);
      parts.push(el("svg:line", {class: "tick", x1: x, x2: x, y1: pane.bottom, y2: pane.bottom + 5}));
      const half = (label.length * LETTER) / 2;
      const middle = Math.max(x, this.left - 8 + half);
      if (middle - half < free || middle + half > end) continue;
      parts.push(el("svg:text", {x: middle, y: pane.bottom + 19, "text-anchor": "middle"}, label));
      free = middle + half + 8;
    }
    const {known} = this.picture;
    if (known !== null && known > from && known < to) {
      // what is to the right of it was the future then
      const x = this.x(known);
      parts.push(
        el("svg:line", {class: "then", x1: x, x2: x, y1: 0, y2: pane.bottom}),
        el("svg:text", {class: "thenSaid", x: x + 5, y: 12}, isFirst ? "known before" : ""),
      );
    }
    parts.push(
      el("svg:line", {class: "axis", x1: this.left, x2: this.right, y1: pane.bottom, y2: pane.bottom}),
    );
    if (isLast)
      parts.push(
        el(
          "svg:text",
          {class: "zone", x: this.right + 8, y: pane.bottom + 19, "text-anchor": "end"},
          zoneName(),
        ),
      );
    return parts;
  }

  // #drawSeries draws, from behind: the band or the lines of the runs, the ghost of what is known now, the line, rings.
  #drawSeries(one, pane) {
    const group = el("svg:g", {class: one.color, "data-key": one.key});
    if (one.runs.length > MOST_LINES) {
      group.append(el("svg:path", {class: "band", d: this.#area(bandOf(one.runs), pane)}));
    } else {
      one.runs.forEach((run, i) => {
        const path = el("svg:path", {class: "run", d: this.#line(pointsOf(run), pane)});
        path.style.opacity = 0.15 + (0.55 * (i + 1)) / one.runs.length; // the older, the paler
        group.append(path);
      });
    }
    if (this.picture.bucket) group.append(el("svg:path", {class: "band", d: this.#area(one.shown, pane)}));
    if (this.picture.moved) group.append(el("svg:path", {class: "ghost", d: this.#line(one.now, pane)}));
    const hasRoom = one.shown.length * FEW < this.right - this.left;
    group.append(
      el("svg:path", {
        class: `flat${hasRoom ? " dotted" : ""}${one.isDashed ? " dashed" : ""}`,
        d: this.#line(one.shown, pane),
      }),
    );
    if (hasRoom) {
      group.append(
        ...one.shown
          .filter((row) => row.value !== null)
          .map((row) => el("svg:circle", {class: "point", r: 2.5, cx: this.x(row.t), cy: pane.y(row.value)})),
      );
    }
    group.append(...one.marks.map((mark) => this.#ring(mark, pane)));
    return group;
  }

  // #line connects values. A null lifts the pen, as do a missing row and an interval that ends too early.
  #line(points, pane) {
    const isGap = gapsOf(points);
    let d = "";
    let isUp = true;
    points.forEach((point, i) => {
      if (point.value === null) {
        isUp = true;
        return;
      }
      const x = this.x(point.t).toFixed(1);
      d += `${isUp || isGap(i) ? "M" : "L"}${x} ${pane.y(point.value).toFixed(1)}h0`; // h0 makes a dot of what stands alone
      if (point.e) d += `H${this.x(point.e).toFixed(1)}`;
      isUp = false;
    });
    return d;
  }

  // #area fills what lies between min and max, a piece between gaps at a time.
  #area(points, pane) {
    const isGap = gapsOf(points);
    const pieces = [];
    points.forEach((point, i) => {
      if (!Number.isFinite(point.min)) return;
      if (pieces.length === 0 || isGap(i)) pieces.push([]);
      pieces.at(-1).push(point);
    });
    const corner = (t, value) => `${this.x(t).toFixed(1)} ${pane.y(value).toFixed(1)}`;
    return pieces
      .map((piece) => {
        const above = piece.flatMap((p) =>
          p.e ? [corner(p.t, p.max), corner(p.e, p.max)] : [corner(p.t, p.max)],
        );
        const below = piece
          .toReversed()
          .flatMap((p) => (p.e ? [corner(p.e, p.min), corner(p.t, p.min)] : [corner(p.t, p.min)]));
        return `M${[...above, ...below].join("L")}Z`;
      })
      .join("");
  }

  // #ring marks a correction by its shape: a ring, with a cross for a value that was taken away and a plus for one added.
  #ring(mark, pane) {
    const kind = kindOf(mark);
    const value = mark.value ?? mark.old_value;
    const x = this.x(mark.e ? (mark.t + mark.e) / 2 : mark.t);
    const y = value === null ? pane.bottom - 8 : Math.min(pane.bottom - 2, Math.max(6, pane.y(value)));
    const inner = {"to null": "M-3 -3L3 3M-3 3L3 -3", added: "M-3.5 0H3.5M0 -3.5V3.5", changed: ""}[kind];
    return el(
      "svg:g",
      {class: "correction", "data-kind": kind, transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`},
      el("svg:circle", {r: kind === "changed" ? 5.5 : 6.5}),
      el("svg:path", {d: inner}),
    );
  }

  // ---- The cursor

  // #entriesAt lists, for a time, what each series shows there.
  #entriesAt(t) {
    const reach = ((this.picture.to - this.picture.from) / (this.right - this.left)) * NEAR;
    const entries = [];
    for (const pane of this.panes) {
      for (const one of pane.series) {
        const row = one.shown[nearest(one.shown, t)];
        if (!row) continue;
        const covers = row.e ? row.t <= t && t < row.e : Math.abs(row.t - t) <= reach;
        if (covers || row.t === t) entries.push({row, one, pane});
      }
    }
    return entries;
  }

  #marksAt(entry) {
    const span = this.picture.bucket ? bucketSpan(entry.one.shown) : 1;
    return entry.one.marks.filter((mark) => mark.t >= entry.row.t && mark.t < entry.row.t + span);
  }

  // #pointAt moves the cursor to a time; at is where the pointer is, if it is one.
  #pointAt(t, at = null) {
    const entries = this.#entriesAt(t);
    const distance = ({row, pane}) =>
      at && pane === at.pane && row.value !== null ? Math.abs(pane.y(row.value) - at.y) : 1e6;
    if (at) entries.sort((a, b) => distance(a) - distance(b));
    this.cursor = {t, entries};
    this.#drawOver();
    this.#fillTip(at);
    if (entries.length > 0) this.on.point(entries[0].row);
  }

  #drawOver() {
    if (!this.picture) return;
    for (const pane of this.panes) {
      const parts = [];
      if (this.drag?.isWide) {
        const [a, b] = [this.drag.x, this.drag.now].sort((m, n) => m - n);
        parts.push(el("svg:rect", {class: "drag", x: a, y: 0, width: b - a, height: pane.bottom}));
      }
      if (this.cursor) {
        const x = this.x(this.cursor.t);
        if (x >= this.left - 1 && x <= this.right + 1)
          parts.push(el("svg:line", {class: "cursor", x1: x, x2: x, y1: 0, y2: pane.bottom}));
        for (const {row, one, pane: own} of this.cursor.entries) {
          if (own !== pane || row.value === null) continue;
          parts.push(
            el("svg:circle", {class: `here ${one.color}`, r: 4.5, cx: this.x(row.t), cy: pane.y(row.value)}),
          );
        }
      }
      const alone = this.alone && pane.series.find((one) => one.key === this.alone.key);
      if (alone)
        parts.push(
          el(
            "svg:g",
            {class: alone.color, "clip-path": pane.clip},
            el("svg:path", {class: "alone", d: this.#line(pointsOf(this.alone.run), pane)}),
          ),
        );
      pane.over.replaceChildren(...parts);
      pane.svg.classList.toggle("hasAlone", Boolean(alone));
    }
  }

  // #describe is what the tooltip, and a screen reader, are told of one series at the cursor.
  #describe(entry) {
    const {row, one} = entry;
    const lines = [];
    if (row.known_time) lines.push(`known ${showTime(Date.parse(row.known_time))}`);
    if (this.picture.bucket)
      lines.push(`${digits(row.min)} to ${digits(row.max)}, ${many(row.count, "value")}`);
    for (const mark of this.#marksAt(entry).slice(0, 3)) {
      const from = mark.old_value === null ? "added" : digits(mark.old_value);
      lines.push(
        `◎ ${from} → ${digits(mark.value)} by ${mark.changed_by ?? "someone"}${mark.annotation ? `: ${mark.annotation}` : ""}`,
      );
    }
    return {
      name: one.key,
      value: row.value === null ? "no value" : digits(row.value) + inUnit(one.unit),
      lines,
    };
  }

  #fillTip(at) {
    const {t, entries} = this.cursor;
    this.tip.hidden = entries.length === 0;
    if (entries.length === 0) return;
    const said = entries.map((entry) => ({...this.#describe(entry), color: entry.one.color}));
    const rows = said.map(({name, value, lines, color}) =>
      el(
        "div",
        {class: `entry ${color}`},
        el("span", {class: "dot"}),
        el("span", {class: "name"}, name),
        el("b", {}, value),
        ...lines.map((line) => el("small", {}, line)),
      ),
    );
    const run = this.alone
      ? [el("div", {class: "entry"}, el("small", {}, `alone: the run known ${showTime(this.alone.run.known)}`))]
      : [];
    this.tip.replaceChildren(el("div", {class: "when"}, `${showTime(t)} ${zoneName()}`), ...rows, ...run);
    if (!at)
      $("readout").textContent =
        `${showTime(t)}: ${said.map((one) => [one.name, one.value, ...one.lines].join(" ")).join("; ")}`;
    const x = this.x(t);
    const isRight = x + this.tip.offsetWidth + 24 > this.root.clientWidth;
    this.tip.style.left = `${Math.max(0, isRight ? x - this.tip.offsetWidth - 14 : x + 14)}px`;
    this.tip.style.top = `${this.#topOf(at?.pane ?? this.panes[0])}px`;
  }

  #topOf(pane) {
    return pane.svg.getBoundingClientRect().top - this.root.getBoundingClientRect().top + 8;
  }

  // #place tells in which pane the pointer is, and where there.
  #place(event) {
    for (const pane of this.panes) {
      const box = pane.svg.getBoundingClientRect();
      if (event.clientY >= box.top && event.clientY <= box.bottom)
        return {pane, x: event.clientX - box.left, y: event.clientY - box.top};
    }
    return null;
  }

  #pointerMoved(event) {
    if (!this.picture) return;
    const at = this.#place(event);
    if (this.drag) {
      this.drag.now = Math.min(this.right, Math.max(this.left, event.clientX - this.drag.origin));
      this.drag.isWide ||= Math.abs(this.drag.now - this.drag.x) > LEAST_DRAG;
      this.#drawOver();
      return;
    }
    if (!at) return;
    this.alone = this.#runAt(at);
    const t = this.#timeOfNearest(this.time(at.x));
    if (t !== null) this.#pointAt(t, at);
  }

  #pointerLeft() {
    this.tip.hidden = true;
    this.alone = null;
    if (!this.drag) this.cursor = null;
    this.#drawOver();
  }

  // #timeOfNearest is the valid time nearest to a time, of all series.
  #timeOfNearest(t) {
    const times = this.picture.series
      .map((one) => one.shown[nearest(one.shown, t)]?.t)
      .filter((time) => time !== undefined);
    if (times.length === 0) return null;
    return times.reduce((best, time) => (Math.abs(time - t) < Math.abs(best - t) ? time : best));
  }

  // #runAt finds the line of a run that is pointed at.
  #runAt({pane, x, y}) {
    const t = this.time(x);
    let found = null;
    let least = NEAR;
    for (const one of pane.series) {
      for (const run of one.allRuns.length > 1 ? one.runs : []) {
        const i = nearestTime(run.t, t);
        if (i < 0 || run.v[i] === null || Math.abs(this.x(run.t[i]) - x) > 2 * NEAR) continue;
        const distance = Math.abs(pane.y(run.v[i]) - y);
        if (distance < least) [least, found] = [distance, {key: one.key, run}];
      }
    }
    return found;
  }

  // showRun shows a run alone that is pointed at elsewhere: all its lines that are known at its time.
  showRun(known) {
    this.alone = null;
    for (const one of this.picture?.series ?? []) {
      const run = one.runs.find((candidate) => candidate.known === known);
      if (run) this.alone = {key: one.key, run};
    }
    this.#drawOver();
  }

  // goTo puts the cursor to a time.
  goTo(t) {
    if (this.picture) this.#pointAt(t);
  }

  // ---- Dragging and keys

  #pressed(event) {
    const at =
      this.picture && event.button === 0 && !event.target.closest("button") ? this.#place(event) : null;
    if (!at) return;
    if (event.pointerType !== "mouse") this.#pointerMoved(event); // a finger points by pressing
    this.drag = {x: Math.max(this.left, at.x), now: at.x, origin: event.clientX - at.x, isWide: false, at};
    this.root.setPointerCapture(event.pointerId);
  }

  #released(event) {
    const drag = this.drag;
    this.drag = null;
    if (!drag) return;
    if (drag.isWide) {
      const [from, to] = [this.time(drag.x), this.time(drag.now)].sort((a, b) => a - b);
      const unit = [60e3, 1e3, 1].find((length) => to - from > 300 * length) ?? 1; // nobody drags to the millisecond
      this.on.zoom(Math.floor(from / unit) * unit, Math.ceil(to / unit) * unit);
      return;
    }
    this.#drawOver();
    const entry = this.cursor?.entries.find(
      ({row, pane}) =>
        pane === drag.at.pane &&
        row.value !== null &&
        Math.hypot(this.x(row.t) - drag.at.x, pane.y(row.value) - drag.at.y) < NEAR,
    );
    clearTimeout(this.clicked);
    if (entry && event.pointerType === "mouse")
      this.clicked = setTimeout(() => this.on.choose(entry.row), TWICE);
  }

  #clickedTwice(event) {
    clearTimeout(this.clicked);
    if (!event.target.closest("button")) this.on.back();
  }

  #keyed(event) {
    if (!this.picture || event.target !== this.root || event.ctrlKey || event.metaKey || event.altKey) return;
    const name = event.shiftKey && event.key.startsWith("Arrow") ? `Shift${event.key}` : event.key;
    const work = {
      ArrowLeft: () => this.#step(-1),
      ArrowRight: () => this.#step(1),
      Home: () => this.#end(0),
      End: () => this.#end(-1),
      ShiftArrowLeft: () => this.on.move(-0.25),
      ShiftArrowRight: () => this.on.move(0.25),
      PageUp: () => this.on.move(-1),
      PageDown: () => this.on.move(1),
      "+": () => this.#scale(0.5),
      "-": () => this.#scale(2),
      Escape: () => this.on.back(),
      Enter: () => {
        if (this.cursor?.entries[0]) this.on.choose(this.cursor.entries[0].row);
      },
    }[name];
    if (!work) return;
    event.preventDefault();
    work();
  }

  // #step moves the cursor to the next valid time of any series, in one direction.
  #step(direction) {
    if (!this.cursor) return this.#end(direction > 0 ? 0 : -1);
    const times = this.picture.series
      .map((one) => {
        const i = nearest(one.shown, this.cursor.t);
        const around = [one.shown[i - 1], one.shown[i], one.shown[i + 1]].filter(Boolean).map((row) => row.t);
        return around.filter((t) => (t - this.cursor.t) * direction > 0).sort((a, b) => (a - b) * direction)[0];
      })
      .filter((t) => t !== undefined);
    if (times.length > 0) this.#pointAt(direction > 0 ? Math.min(...times) : Math.max(...times));
  }

  #end(place) {
    const times = this.picture.series.map((one) => one.shown.at(place)?.t).filter((t) => t !== undefined);
    if (times.length > 0) this.#pointAt(place === 0 ? Math.min(...times) : Math.max(...times));
  }

  #scale(factor) {
    const {from, to} = this.picture;
    const middle =
      this.cursor && this.cursor.t >= from && this.cursor.t <= to ? this.cursor.t : (from + to) / 2;
    this.on.zoom(Math.floor(middle - (middle - from) * factor), Math.ceil(middle + (to - middle) * factor));
  }
}

// ---- Numbers of a plot

// shareOf is how much of the height the i-th pane of a number has: the first is the main one.
function shareOf(i, count) {
  if (count === 1) return 1;
  return i === 0 ? 0.62 : 0.38;
}

const pointsOf = (run) => run.t.map((t, i) => ({t, e: run.e[i], value: run.v[i]}));

// rangeOf is what the axis of values spans: what is known now, what every run said and what was corrected, so that it
// stays when a moment moves; and what was shown then, as a run that was withdrawn may lie elsewhere.
function rangeOf(series) {
  let [lo, hi] = [Infinity, -Infinity];
  const take = (value) => {
    if (!Number.isFinite(value)) return;
    if (value < lo) lo = value;
    if (value > hi) hi = value;
  };
  for (const one of series) {
    for (const row of one.now.concat(one.shown)) [row.value, row.min, row.max].forEach(take);
    for (const run of one.allRuns) run.v.forEach(take);
    for (const mark of one.allMarks) [mark.value, mark.old_value].forEach(take);
  }
  if (lo > hi) return [0, 1];
  const air = hi > lo ? Math.max((hi / 4 - lo / 4) / 5, Math.abs(hi) / 1e12) : Math.abs(hi) / 20 || 1;
  const isNearZero = lo >= 0 && lo < hi / 4 - lo / 4;
  return [isNearZero ? 0 : Math.max(lo - air, -Number.MAX_VALUE), Math.min(hi + air, Number.MAX_VALUE)];
}

// nearestTime finds in ascending times the place of the one nearest to t; -1 if there are none.
function nearestTime(times, t) {
  return nearestBy(times.length, (i) => times[i], t);
}

function nearest(rows, t) {
  return nearestBy(rows.length, (i) => rows[i].t, t);
}

function nearestBy(count, timeAt, t) {
  let [low, high] = [0, count - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (timeAt(middle) < t) low = middle + 1;
    else high = middle;
  }
  if (count === 0) return -1;
  return low > 0 && t - timeAt(low - 1) < timeAt(low) - t ? low - 1 : low;
}

function bucketSpan(rows) {
  const steps = rows.slice(1, 50).map((row, i) => row.t - rows[i].t);
  return steps.length > 0 ? Math.min(...steps) : 1;
}

// gapsOf returns a function that says whether rows are missing before the i-th. Only where most steps are like the one
// before it, as in irregular series nothing is ever missing. A step is too long if it exceeds by half what is usual
// around it, because a series may change from hours to quarters of an hour.
function gapsOf(points) {
  const steps = points.map((point, i) => (i === 0 ? 0 : point.t - (points[i - 1].e ?? points[i - 1].t)));
  if (points.some((point) => point.e)) return (i) => steps[i] !== 0;
  const alike = steps.filter((step, i) => i > 1 && Math.abs(step - steps[i - 1]) <= 0.15 * step).length;
  if (alike < 0.6 * (steps.length - 2)) return () => false;
  return (i) => {
    const around = steps.slice(Math.max(1, i - 2), i + 3).sort((a, b) => a - b);
    return steps[i] > 1.5 * around[around.length >> 1];
  };
}
