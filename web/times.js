// Times and numbers as people read them. Times are milliseconds since 1970; the zone is "UTC" or "local" and changes
// labels and inputs, never data.

export const HOUR = 3600e3;
export const DAY = 24 * HOUR;

let zone = "UTC";
export const setZone = (name) => {
  zone = name;
};
export const isLocal = () => zone === "local";
export const zoneName = () => (isLocal() ? Intl.DateTimeFormat().resolvedOptions().timeZone : "UTC");

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
const two = (n) => String(n).padStart(2, "0");

// fields are what a calendar and a clock in the zone show.
function fields(time) {
  const d = new Date(time);
  if (isLocal())
    return [
      d.getFullYear(),
      d.getMonth(),
      d.getDate(),
      d.getHours(),
      d.getMinutes(),
      d.getSeconds(),
      d.getMilliseconds(),
    ];
  return [
    d.getUTCFullYear(),
    d.getUTCMonth(),
    d.getUTCDate(),
    d.getUTCHours(),
    d.getUTCMinutes(),
    d.getUTCSeconds(),
    d.getUTCMilliseconds(),
  ];
}

// moment is the inverse of fields. Fields beyond their range carry over, such as the 32nd of a month.
function moment(...given) {
  const all = [1970, 0, 1, 0, 0, 0, 0].map((least, i) => given[i] ?? least);
  return isLocal() ? new Date(...all).getTime() : Date.UTC(...all);
}

// clock shows seconds and their fraction only where there are any.
function clock(hours, minutes, seconds, millis) {
  let text = `${two(hours)}:${two(minutes)}`;
  if (seconds || millis) text += `:${two(seconds)}`;
  if (millis) text += `.${String(millis).padStart(3, "0")}`;
  return text;
}

export function showTime(time) {
  const [year, month, day, ...rest] = fields(time);
  return `${year}-${two(month + 1)}-${two(day)} ${clock(...rest)}`;
}

export function showDate(time) {
  const [year, month, day] = fields(time);
  return `${day} ${MONTHS[month]} ${year}`;
}

export const iso = (time) => new Date(time).toISOString().replace(/(:00)?\.000Z$/, "Z");

// timeIn reads a field as showTime writes it, in the zone: null if it is empty. Its own clock may be left out. Where it is
// no time, the field says so, and undefined is returned.
export function timeIn(field) {
  const text = field.value.trim();
  const parts = /^(\d{4})-(\d\d)-(\d\d)(?:[ T](\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,3}))?)?)?$/.exec(text);
  field.setCustomValidity(text && !parts ? "Expected a time such as 2025-10-21 10:00, or nothing." : "");
  if (!field.reportValidity()) return undefined;
  if (!parts) return null;
  const [year, month, day, hours = 0, minutes = 0, seconds = 0, millis = "0"] = parts.slice(1);
  const time = moment(+year, month - 1, +day, +hours, +minutes, +seconds, +millis.padEnd(3, "0"));
  // A day or an hour that there is not was carried over into the next.
  const isThere = showTime(time).startsWith(`${year}-${month}-${day}`) && hours < 24 && minutes < 60 && seconds < 60;
  field.setCustomValidity(isThere ? "" : "There is no such day or time.");
  return field.reportValidity() ? time : undefined;
}

export function showSpan(span) {
  if (span % DAY === 0 && span >= 5 * DAY) return `${span / DAY} d`;
  if (span % HOUR === 0) return `${span / HOUR} h`;
  return `${Math.round(span / 60e3)} min`;
}

// ---- Ticks

// Between ticks, finest first: how many of which field, and about how long that is.
const STEPS = [
  ...[1, 5, 10, 50, 100, 500].map((n) => [6, n, n]),
  ...[1, 5, 15, 30].map((n) => [5, n, n * 1e3]),
  ...[1, 5, 15, 30].map((n) => [4, n, n * 60e3]),
  ...[1, 3, 6, 12].map((n) => [3, n, n * HOUR]),
  ...[1, 2, 7, 14].map((n) => [2, n, n * DAY]),
  ...[1, 3, 6].map((n) => [1, n, n * 30 * DAY]),
  ...[1, 2, 5, 10, 20, 50, 100].map((n) => [0, n, n * 365 * DAY]),
];

// timeTicks returns about count times at which a field of the calendar or of the clock begins, with their labels.
export function timeTicks(from, to, count) {
  const least = (to - from) / count;
  const [field, n] = STEPS.find(([, , length]) => length >= least) ?? STEPS.at(-1);
  const begin = fields(from).slice(0, field + 1);
  if (field === 2)
    begin[2] = n < 7 ? 1 : begin[2] - ((new Date(Date.UTC(...begin)).getUTCDay() + 6) % 7); // Mondays
  else begin[field] -= begin[field] % n;
  const ticks = [];
  for (let i = 0; ticks.length < 200; i++) {
    const time = moment(...begin.with(-1, begin.at(-1) + i * n));
    if (time > to) break;
    if (time >= from && time !== ticks.at(-1)?.time)
      ticks.push({time, label: tickLabel(time, field, ticks.length === 0)});
  }
  return ticks;
}

// tickLabel names what begins: a year, a month, a day, or a time of the day. The first label says the whole of it.
function tickLabel(time, field, isFirst) {
  const [year, month, day, ...rest] = fields(time);
  const isDay = rest.every((n) => n === 0);
  if (field === 0 || (month === 0 && day === 1 && isDay)) return String(year);
  if (field === 1) return isFirst ? `${MONTHS[month]} ${year}` : MONTHS[month];
  if (field === 2 || isDay) return isFirst ? showDate(time) : `${day} ${MONTHS[month]}`;
  return isFirst ? `${day} ${MONTHS[month]} ${clock(...rest)}` : clock(...rest);
}

// numberTicks returns about count round numbers within lo and hi. Quarters, because hi - lo may be beyond all numbers.
export function numberTicks(lo, hi, count) {
  const least = ((hi / 4 - lo / 4) / count) * 4;
  const power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].map((n) => n * power).find((s) => s >= least) ?? power * 10;
  const ticks = [];
  for (let n = Math.ceil(lo / step); n * step <= hi && ticks.length < 100; n++)
    ticks.push(Number((n * step).toPrecision(12)));
  return ticks;
}

// ---- Numbers

// digits shows a number with six digits, which is what an eye can use; tables have the exact one as their title.
export function digits(value) {
  if (value === null || value === undefined) return "no value";
  if (Object.is(value, -0)) return "-0";
  return String(Number(value.toPrecision(6)));
}

export const many = (n, one, several = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : several}`;

export const inUnit = (unit) => (unit === "dimensionless" ? "" : ` ${unit}`);
