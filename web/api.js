// What every part of the page needs: elements, and questions to the server.
//
// Whatever comes from the server or from the visitor is put into the page as text (append, textContent, value), never
// as HTML. The key stays in this module: no URL, no storage and no cookie has it, and a reload forgets it.

const MOST_AT_ONCE = 4; // requests: a server gives each tenant a share, and a page must not take all of it
const REFUSED = "The key was refused: it has a character that no key has.";
const BROKEN = "timedb did not answer, or its answer broke off. Is it running? Try again.";

export const $ = (id) => document.getElementById(id);

// el makes an element, or with "svg:" before its tag one of SVG, with attributes, listeners (on…) and children.
export function el(tag, attributes = {}, ...children) {
  const isDrawing = tag.startsWith("svg:");
  const node = isDrawing
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// ---- The key

let key = "";
export let logins = 0; // counts keys: an answer to an earlier one is nobody's

export function useKey(text) {
  logins++;
  key = text.trim();
  if (/[^ -~]/.test(key)) {
    key = "";
    throw new Error(REFUSED);
  }
}

// ---- Requests

export const counts = {sent: 0, running: 0, most: 0}; // for the tests of the page
const waiting = [];
const newest = new Map(); // the AbortController of the latest question about a topic

// supersede cancels what was asked before about a topic, and returns the signal for what is asked now.
export function supersede(topic) {
  newest.get(topic)?.abort();
  const controller = new AbortController();
  newest.set(topic, controller);
  return controller.signal;
}

// place waits until fewer than MOST_AT_ONCE requests run, first come first served.
function place() {
  if (counts.running < MOST_AT_ONCE) {
    counts.running++;
    counts.most = Math.max(counts.most, counts.running);
    return undefined;
  }
  return new Promise((resolve) => waiting.push(resolve));
}

function leave() {
  const next = waiting.shift();
  if (next)
    next(); // which takes the place over
  else counts.running--;
}

// ask sends a request and hands its answer to a function, which reads the body while the place is held.
export async function ask(path, options, use) {
  const mine = key; // another may be given while this waits for a place
  await place();
  try {
    options.signal?.throwIfAborted();
    counts.sent++;
    const headers = {...options.headers};
    if (mine) headers["X-API-Key"] = mine;
    return await use(await fetch(path, {cache: "no-store", ...options, headers}));
  } finally {
    leave();
  }
}

// failure is the error of an answer that is none: it says what the server says.
async function failure(answer) {
  let detail = `timedb answered with status ${answer.status}.`;
  try {
    detail = (await answer.json()).detail ?? detail;
  } catch {
    // A proxy before timedb may answer with something else than JSON.
  }
  if (answer.status === 401) detail = `The key was refused: ${detail}`;
  return Object.assign(new Error(detail), {status: answer.status});
}

// read returns the body of an answer that is as it should be. What was cancelled throws an AbortError.
async function read(path, options, decode) {
  let refused = null;
  try {
    return await ask(path, options, async (answer) => {
      if (answer.ok) return decode(answer);
      refused = await failure(answer);
      throw refused;
    });
  } catch (error) {
    if (error === refused || error.name === "AbortError") throw error;
    throw Object.assign(new Error(BROKEN), {status: 0});
  }
}

const pathOf = (route, parameters) => {
  const query = new URLSearchParams(parameters);
  return query.size ? `${route}?${query}` : route;
};

export const get = (route, parameters, signal) =>
  read(pathOf(route, parameters), {signal}, (answer) => answer.json());

export const getBlob = (route, parameters) => read(pathOf(route, parameters), {}, (answer) => answer.blob());

export function send(method, route, body) {
  const options = {method, headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)};
  return read(route, options, (answer) => answer.json());
}

export const urlOf = (route, parameters) =>
  new URL(pathOf(route, parameters), location.href.split("#")[0]).href;
