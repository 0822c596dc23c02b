// The two dialogs that write: a correction, and the withdrawal of a run, which is asked twice.

import {$, send} from "./api.js";
import {digits, inUnit, many, showTime, zoneName} from "./times.js";

const TWICE = 600; // milliseconds in which a second click may be a double click

const tagsOf = (text) =>
  text
    .split(",")
    .map((tag) => tag.trim())
    .filter(Boolean);

// open shows a dialog. submit() does the work when its form is sent; it returns whether the dialog may close, and what it
// throws is shown in the dialog.
function open(dialog, submit) {
  const form = dialog.querySelector("form");
  const said = dialog.querySelector(".error");
  const button = dialog.querySelector(".primary");
  const closer = dialog.querySelector("[data-closes]");
  said.textContent = "";
  closer.onclick = () => dialog.close();
  dialog.oncancel = (event) => {
    if (closer.disabled) event.preventDefault(); // the answer must find the dialog that asked
  };
  form.onsubmit = async (event) => {
    event.preventDefault();
    button.disabled = true;
    closer.disabled = true;
    said.textContent = "";
    try {
      if (await submit()) dialog.close();
    } catch (error) {
      said.textContent = error.message;
    } finally {
      button.disabled = false;
      closer.disabled = false;
    }
  };
  form.oninput = () => {
    said.textContent = "";
  };
  dialog.showModal();
}

// correct asks for the new value of a row with detail, and calls done when it is stored. What is left as it was is not
// sent, so that it stays.
export function correct(row, done) {
  const value = $("correct-value");
  const isNull = $("correct-null");
  const before = {
    value: row.value === null ? "" : String(row.value),
    why: row.annotation ?? "",
    tags: (row.tags ?? []).join(", "),
  };
  $("correct-what").textContent =
    `${row.series_key} at ${showTime(row.t)} ${zoneName()}, now ${digits(row.value)}` +
    `${row.value === null ? "" : inUnit(row.series_unit)}, of the run known ${showTime(Date.parse(row.known_time))}`;
  value.value = before.value;
  isNull.checked = row.value === null;
  value.disabled = isNull.checked;
  isNull.onchange = () => {
    value.disabled = isNull.checked;
  };
  $("correct-why").value = before.why;
  $("correct-tags").value = before.tags;
  // A field of one line drops line breaks: what it shows is what it is compared with.
  before.why = $("correct-why").value;
  before.tags = $("correct-tags").value;
  open($("correct"), async () => {
    const update = {series_id: row.series_id, run_id: row.run_id, valid_time: row.valid_time};
    if (row.valid_time_end) update.valid_time_end = row.valid_time_end;
    const isOther =
      isNull.checked !== (row.value === null) || (!isNull.checked && value.value.trim() !== before.value);
    if (isOther) update.value = isNull.checked ? null : numberIn(value.value);
    if ($("correct-why").value !== before.why) update.annotation = $("correct-why").value.trim() || null;
    if ($("correct-tags").value !== before.tags) update.tags = tagsOf($("correct-tags").value);
    if (Object.keys(update).every((name) => /_id$|_time/.test(name)))
      throw new Error("Nothing is changed yet.");
    await send("PUT", "values", {updates: [update]});
    done();
    return true;
  });
  value.select();
}

// numberIn reads a decimal number, with a point or a comma; 1,234 might be either of two.
function numberIn(text) {
  const number = Number(text.trim().replace(",", "."));
  if (/^-?\d{1,3},\d{3}$/.test(text.trim()))
    throw new Error("The comma may be a decimal point or not: write a point, or leave it out.");
  if (!/^[-+.,\deE]+$/.test(text.trim()) || !Number.isFinite(number))
    throw new Error("The new value is not a number. For none, tick “no value”.");
  return number;
}

export function withdraw(run, done) {
  const sure = $("withdraw-sure");
  let asked = 0; // when the second question was put
  const button = $("withdraw").querySelector(".primary");
  $("withdraw-what").textContent =
    `${run.workflow_id}, known ${showTime(run.known)} ${zoneName()}: no read will show its ${many(run.rows, "value")} any ` +
    "more, in any series, and what it had covered shows again. Nothing is deleted: “Stored by” a moment before still shows it.";
  $("withdraw-why").value = "";
  sure.hidden = true;
  button.textContent = "Withdraw…";
  open($("withdraw"), async () => {
    if (sure.hidden) {
      sure.hidden = false;
      button.textContent = "Yes, withdraw it";
      asked = Date.now();
      return false;
    }
    if (Date.now() - asked < TWICE) return false; // a double click, or a key held down, is no answer
    const annotation = $("withdraw-why").value.trim();
    await send("POST", `runs/${encodeURIComponent(run.run_id)}/withdraw`, annotation ? {annotation} : {});
    done();
    return true;
  });
}
