// The two moments: what was known before one, and what was stored by the other. Each has a slider, a field and a sentence.

import {$, el} from "./api.js";
import {DAY, showTime, timeIn, zoneName} from "./times.js";

const PLACES = 1000; // of a slider; the last one is now

// Moment keeps its time in a state, under its name: null is now. Places are spread evenly over time, from the first to the
// last of its stops.
export class Moment {
  // onMove is called when the time changes; sentence(time) says what it means.
  constructor(name, state, onMove, sentence) {
    Object.assign(this, {name, state, onMove, sentence});
    this.slider = $(name);
    this.field = $(`${name}-time`);
    this.first = 0;
    this.last = 1;
    this.slider.addEventListener("input", () => this.#slid());
    this.field.addEventListener("change", () => {
      const time = timeIn(this.field);
      if (time !== undefined) this.#set(time);
    });
    $(`${name}-now`).addEventListener("click", () => this.#set(null));
  }

  // #slid leaves the slider where the hand has put it.
  #slid() {
    const place = Number(this.slider.value);
    this.state[this.name] = place < PLACES ? this.#timeAt(place) : null;
    this.#say();
    this.onMove();
  }

  #set(time) {
    this.state[this.name] = time;
    this.show();
    this.onMove();
  }

  // #timeAt is rounded to minutes where that is fine enough, because people read it.
  #timeAt(place) {
    const span = this.last - this.first;
    const time = this.first + (span * place) / PLACES;
    return span > 2 * DAY ? Math.ceil(time / 60e3) * 60e3 : Math.ceil(time);
  }

  #placeOf(time) {
    return Math.round(((time - this.first) / (this.last - this.first)) * PLACES);
  }

  // setStops draws the stops below the slider, and spreads its places over them.
  setStops(stops) {
    this.slider.disabled = stops.length === 0;
    if (stops.length > 0) {
      this.first = stops.reduce((a, b) => Math.min(a, b));
      this.last = stops.reduce((a, b) => Math.max(a, b)) + 1;
    }
    const marks = new Set(stops.map((time) => this.#placeOf(time)));
    const d = [...marks].map((x) => `M${x} 2V8`).join("");
    const rug = $(`${this.name}-rug`);
    rug.setAttribute("viewBox", `0 0 ${PLACES} 8`);
    rug.setAttribute("preserveAspectRatio", "none");
    rug.replaceChildren(el("svg:path", {"vector-effect": "non-scaling-stroke", d}));
    this.show();
  }

  // show puts slider, field and sentence to the time of the state. Only now is at the last place.
  show() {
    const time = this.state[this.name];
    this.slider.value = time === null ? PLACES : Math.max(0, Math.min(PLACES - 1, this.#placeOf(time)));
    this.#say();
  }

  #say() {
    const time = this.state[this.name];
    this.field.value = time === null ? "" : showTime(time);
    this.slider.setAttribute("aria-valuetext", time === null ? "now" : `${showTime(time)} ${zoneName()}`);
    this.slider.closest(".moment").classList.toggle("moved", time !== null);
    $(`${this.name}-said`).textContent = this.sentence(time);
  }
}
