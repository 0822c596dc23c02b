// The page's second view: every route as openapi.json describes it, with a form to try it.

import {$, ask, el, get, logins} from "./api.js";

const MOST_TEXT = 50000; // characters of an answer that are shown
const NO_ANSWER = "timedb did not answer, or its answer broke off.";

let live = null; // what there is in the database, for examples: {series_key, valid_time, run_id, …}
let chosen = ""; // the series that it is asked of
const operations = [];

// forgetExamples takes away what was asked and answered with another key.
export function forgetExamples() {
  live = null;
  showExamples([], []);
  for (const operation of operations) operation.forget();
}

// showExamples is told of the series of the tenant. What exists is asked for when an example is wanted.
export function showExamples(catalog, keys) {
  chosen = keys[0] ?? catalog[0]?.series_key ?? "";
  $("live-keys").replaceChildren(...catalog.slice(0, 1000).map((one) => el("option", {value: one.series_key})));
}

async function exists() {
  const asked = logins;
  if (!live && chosen) {
    const answer = await get("values", [
      ["series_key", chosen],
      ["latest", "true"],
      ["detail", "true"],
    ]);
    if (asked !== logins) return {};
    live = answer.data[0] ?? {series_key: chosen};
  }
  return live ?? {};
}

export async function initReference() {
  const place = $("reference");
  place.append(el("datalist", {id: "live-keys"}));
  try {
    const api = await get("openapi.json", {});
    const follow = (node) =>
      node?.$ref
        ? node.$ref
            .slice(2)
            .split("/")
            .reduce((at, name) => at[name], api)
        : node;
    for (const [path, methods] of Object.entries(api.paths)) {
      for (const [method, spec] of Object.entries(methods))
        operations.push(new Operation(path, method.toUpperCase(), spec, follow));
    }
    const isOpen = (operation) => operation.spec.security?.length === 0;
    place.append(
      el("h2", {}, "Reference"),
      el("p", {}, api.info.description),
      el("h2", {}, "Data"),
      ...operations.filter((one) => !isOpen(one)).map((one) => one.node),
      el("h2", {}, "This server"),
      ...operations.filter(isOpen).map((one) => one.node),
    );
  } catch (error) {
    place.append(el("p", {class: "error", role: "alert"}, error.message));
  }
}

// Operation is one route: what it does, a form, its answer, and the statuses that it may have.
class Operation {
  constructor(path, method, spec, follow) {
    Object.assign(this, {path, method, spec, follow});
    this.content = follow(spec.requestBody)?.content ?? {};
    this.fields = (spec.parameters ?? [])
      .map(follow)
      .filter((one) => one.in !== "header")
      .map((one) => this.#field(one));
    this.kind = el(
      "select",
      {"aria-label": "Content-Type"},
      ...Object.keys(this.content).map((kind) => el("option", {}, kind)),
    );
    this.kind.addEventListener("change", () => this.#fillBody());
    this.body = el("textarea", {"aria-label": `Body of ${method} ${path}`, spellcheck: "false"});
    this.answer = el("pre", {
      class: "answer",
      hidden: true,
      tabindex: "0",
      "aria-label": `Answer of ${method} ${path}`,
    });
    const title = el(
      "summary",
      {},
      el("code", {}, el("span", {class: "method"}, method), ` ${path}`),
      el("span", {class: "quiet"}, spec.summary),
    );
    this.node = el(
      "details",
      {class: "operation"},
      title,
      el("div", {}, el("p", {}, spec.description ?? ""), this.#form(), this.answer, this.#statuses()),
    );
    this.#fillBody();
  }

  get hasBody() {
    return Object.keys(this.content).length > 0;
  }

  // #field is the control of a parameter: a choice where there are few values, and more than one where it may be repeated.
  #field(parameter) {
    const schema = this.follow(parameter.schema);
    const isList = schema.type === "array";
    const item = this.follow(isList ? schema.items : schema);
    const choices = item.enum ?? (item.type === "boolean" ? [true, false] : null);
    const make = () => {
      if (choices)
        return el(
          "select",
          {"aria-label": parameter.name},
          el("option", {value: ""}, ""),
          ...choices.map((one) => el("option", {}, String(one))),
        );
      const list = parameter.name === "series_key" ? "live-keys" : false;
      return el("input", {
        "aria-label": parameter.name,
        placeholder: String([parameter.example ?? ""].flat()[0]),
        autocomplete: "off",
        list,
      });
    };
    const inputs = el("div", {}, make());
    const more = el(
      "button",
      {type: "button", "aria-label": `Another ${parameter.name}`, onclick: () => inputs.append(make())},
      "+",
    );
    const place = el("td", {}, el("div", {class: "field"}, inputs, isList ? more : null));
    const values = () =>
      [...place.querySelectorAll("input, select")].map((one) => one.value).filter((value) => value !== "");
    const put = (value) => {
      place.querySelector("input, select").value = value;
    };
    return {...parameter, place, values, put};
  }

  #form() {
    const rows = this.fields.map((one) =>
      el("tr", {}, el("th", {scope: "row"}, one.name), one.place, el("td", {}, one.description ?? "")),
    );
    const table = rows.length > 0 ? el("table", {class: "parameters"}, el("tbody", {}, ...rows)) : "";
    const example = el("button", {type: "button", onclick: () => this.#fillExample()}, "Fill in what exists");
    return el(
      "form",
      {onsubmit: (event) => this.#send(event)},
      table,
      ...(this.hasBody ? [this.kind, this.body] : []),
      el("p", {class: "row"}, el("button", {class: "primary"}, "Send"), this.fields.length > 0 ? example : ""),
    );
  }

  #statuses() {
    const all = Object.entries(this.spec.responses).map(([status, one]) => [
      status,
      this.follow(one).description,
    ]);
    const rows = all.map(([status, text]) =>
      el("tr", {}, el("th", {scope: "row"}, status), el("td", {}, text)),
    );
    return el(
      "details",
      {class: "statuses"},
      el("summary", {}, `Statuses: ${all.map(([status]) => status).join(", ")}`),
      el("table", {}, el("tbody", {}, ...rows)),
    );
  }

  // #fillBody puts the document's first example of a body into the form, with the query that belongs to it.
  #fillBody() {
    const {examples = {}} = this.content[this.kind.value] ?? {};
    const {value = "", "x-query": query = {}} = this.follow(Object.values(examples)[0]) ?? {};
    this.body.value = typeof value === "string" ? value : JSON.stringify(value, null, 1);
    for (const field of this.fields) if (field.name in query) field.put(query[field.name]);
  }

  // #fillExample fills in a series, a window and a run that exist in this database.
  async #fillExample() {
    try {
      const there = await exists();
      const last = Date.parse(there.valid_time ?? new Date().toISOString());
      const iso = (time) => new Date(time).toISOString();
      const values = {
        series_key: there.series_key,
        run_id: there.run_id,
        limit: 100,
        start_valid: iso(last - 24 * 3600e3),
        end_valid: iso(last + 1000),
      };
      for (const field of this.fields) {
        // A write is told by its body, and a read of one run would show little of a series.
        const isWanted = field.in === "path" || (!this.hasBody && field.name !== "run_id");
        if (isWanted && values[field.name] !== undefined) field.put(values[field.name]);
      }
      if (this.method === "PUT" && there.valid_time) {
        const update = {
          series_key: there.series_key,
          valid_time: there.valid_time,
          value: there.value,
          annotation: "why it was wrong",
        };
        this.body.value = JSON.stringify({updates: [update]}, null, 1);
      }
    } catch (error) {
      this.#show(error.message);
    }
  }

  forget() {
    for (const field of this.node.querySelectorAll(".parameters input")) field.value = "";
    this.answer.hidden = true;
    this.answer.textContent = "";
    this.#fillBody();
  }

  #show(text) {
    this.answer.hidden = false;
    this.answer.textContent = text;
  }

  async #send(event) {
    event.preventDefault();
    const query = new URLSearchParams();
    let target = this.path;
    for (const field of this.fields) {
      if (field.in === "path")
        target = target.replace(`{${field.name}}`, encodeURIComponent(field.values()[0] ?? ""));
      else for (const value of field.values()) query.append(field.name, value);
    }
    const options = {method: this.method};
    if (this.hasBody)
      Object.assign(options, {body: this.body.value, headers: {"Content-Type": this.kind.value}});
    this.#show("…");
    const asked = logins;
    try {
      await ask(`.${target}${query.size ? `?${query}` : ""}`, options, async (answer) => {
        const text = await answer.text();
        if (asked !== logins) return;
        const rest = text.length > MOST_TEXT ? `\n… and ${text.length - MOST_TEXT} characters more` : "";
        this.#show(
          `${answer.status} ${answer.statusText}\n${text.slice(0, MOST_TEXT).replaceAll("},{", "},\n{")}${rest}`,
        );
      });
    } catch {
      if (asked === logins) this.#show(NO_ANSWER);
    }
  }
}
