"""timedb from a notebook. Copy this file beside it; it needs pandas (1.5 or later) and requests, and nothing else.

    import timedb
    db = timedb.Client("http://127.0.0.1:8000", "tdb_YOUR_KEY")  # or TIMEDB_URL and TIMEDB_KEY in the environment

    db.read("wind_mw", start_valid="2025-01-01")                 # a long frame: one row for each value
    db.read("wind_mw", "load_mw", wide=True)                     # a wide one: one column for each series
    db.upload(frame, known_time="2024-12-31T12:00Z")             # a long or a wide one; the answer has the run_id
    db.correct("wind_mw", "2025-01-01T03:00Z", value=80.0, annotation="turbine 7 was off")
    db.corrections(since="2025-01-01")                           # who changed what, when and why
    db.withdraw(run_id, annotation="wrong weather model")        # from now on no read shows this run
    db.series(), db.runs(), db.create_series("wind_mw", unit="MW")

Keyword arguments are the parameters of the route, as /docs explains them. Times may be texts, datetimes or Timestamps; without
a time zone they mean UTC. What the server refuses raises timedb.Refused with the server's own sentence.
"""
import io
import json
import os
import time
import uuid
import warnings

import pandas as pd
import requests

TEXTS = ["series_id", "series_key", "series_unit", "run_id", "changed_by", "annotation", "tags"]
VERSION = tuple(int(n) for n in pd.__version__.split(".")[:2])
ISO = {"format": "ISO8601"} if VERSION >= (2, 0) else {}  # times with and without a fraction in one column
EXACT = {"float_precision": "round_trip"} if VERSION < (3, 1) else {}  # which is the default now
BUSY = (429, 502, 503, 504)  # of timedb, or of a proxy before it
NO_ANSWER = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
MOST = 10_000  # runs or corrections, in one answer
TIMEOUT = 120  # seconds without a word from the server


class Refused(Exception):
    """The server said no, and nothing was stored. The text is its sentence."""

    def __init__(self, response):
        try:
            sentence = response.json()["detail"]
        except (ValueError, KeyError, TypeError):  # from a proxy, for example
            sentence = f"{response.status_code} {response.reason}"
        super().__init__(sentence)
        self.status = response.status_code


class Client:
    def __init__(self, url=None, key=None, patience=60):
        """patience: for how many seconds a request is sent again that nobody answers, or for which the server is too busy."""
        self.url = (url or os.environ.get("TIMEDB_URL", "http://127.0.0.1:8000")).rstrip("/")
        self.patience = patience
        self.session = requests.Session()
        self.session.headers["X-API-Key"] = key or os.environ.get("TIMEDB_KEY")  # requests sends none that is None

    def read(self, *series_keys, wide=False, **params):
        """What GET /values answers. Without series_keys, series_id and match: all series.

        wide: one column for each series, the valid_time as index; with mode="overlapping" known_time and valid_time.
        tz is for days and longer as ISO 8601 writes them, such as bucket="P1D"; a bucket of "1D" is 24 hours of UTC.
        """
        bucket = params.get("bucket")
        if bucket is not None and "tz" in params and "time_of_day" not in params and not str(bucket).startswith("P"):
            raise ValueError(f'tz has no effect on bucket={bucket!r}, which is exact and in UTC: for local days say bucket="P1D"')
        if series_keys:
            params["series_key"] = list(series_keys)
        frame = self._frame("/values", **params)
        if not wide:
            return frame
        index = ["known_time", "valid_time"] if params.get("mode") == "overlapping" else ["valid_time"]
        if frame.duplicated(index + ["series_key"]).any():
            raise ValueError("a wide frame has one value for each time and series, and here are several, as of two runs with "
                             "one known_time: read(wide=False)")
        values = [c for c in frame if c not in TEXTS and "_time" not in c]
        return frame.pivot(index=index if len(index) > 1 else index[0], columns="series_key",
                           values=values if len(values) > 1 else values[0])

    def upload(self, frame, keep_missing=False, **run):
        """Stores a frame as one run, all or nothing, and returns the answer: run_id, series_ids, rows_inserted.

        A long frame has the columns valid_time, value and series_key (or value_key, or series_id), perhaps valid_time_end; the
        valid_time may be its index. Its missing values are stored as NULL. A frame without a column "value" is wide: times in
        its index (or its column valid_time), and one column for each series. Its missing values are left out, unless
        keep_missing. run: known_time, workflow_id, run_params, create_series=False, …

        The run has a run_id of its own, so it is stored once however often this call has to send it. Another call is another
        run, unless both are given the same run_id.
        """
        if isinstance(frame, pd.Series):
            if frame.name is None:
                raise ValueError("the Series has no name, which would be its series_key: frame.rename('wind_mw')")
            frame = frame.to_frame()
        if "valid_time" not in frame:
            frame = frame.rename_axis(index="valid_time").reset_index()
        if "value" not in frame:
            frame = frame.melt("valid_time", var_name="series_key")
            if not keep_missing:
                frame = frame.dropna(subset=["value"])
        body = frame.drop(columns="series_unit", errors="ignore").to_csv(index=False).encode()
        run = {"run_id": str(uuid.uuid4()), **run}
        return self._send("POST", "/upload", params=run, data=body, headers={"Content-Type": "text/csv"}).json()

    def correct(self, series_key, valid_time, **update):
        """Corrects one value: value, annotation, tags; what is left out stays, None clears it. Which: run_id or known_time, or
        neither for the value that a flat read shows now; valid_time_end of an interval. Where there is no value yet, run_id or
        known_time says which run gets one."""
        return self.correct_all([{"series_key": series_key, "valid_time": valid_time, **update}])

    def correct_all(self, updates):
        """Corrects many values, all or nothing: a list of dicts with the members of PUT /values. NaN as value is None."""
        body = json.dumps({"updates": [{name: _plain(v) for name, v in update.items()} for update in updates]})
        return self._send("PUT", "/values", data=body.encode(), headers={"Content-Type": "application/json"}).json()

    def corrections(self, **params):
        """Who changed what, when and why, the newest first: since, until, series_key, changed_by, tag, … All, unless limit
        says how many. A run that was withdrawn is not among them: runs() has its withdrawn_at."""
        if "limit" in params:
            return self._frame("/corrections", **params)
        parts = [self._frame("/corrections", limit=MOST, **params)]
        while len(parts[-1]) >= MOST:  # an answer holds all of its last change_time
            params["until"] = parts[-1]["change_time"].min()
            parts.append(self._frame("/corrections", limit=MOST, **params))
        return pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)

    def withdraw(self, run_id, annotation=None):
        """Takes a run back: from now on no read shows it. Nothing is deleted; as_of a moment before answers as it did."""
        return self._send("POST", f"/runs/{run_id}/withdraw", json={"annotation": annotation}).json()

    def create_series(self, name, **more):
        """Creates a series: unit, description."""
        return self._send("POST", "/series", json={"name": name, **more}).json()

    def series(self, **params):
        """The series that there are: series_id as index, series_key, description, unit."""
        found = self._send("GET", "/list_timeseries", params=params).json()
        columns = None if found else ["series_key", "description", "unit"]
        return pd.DataFrame(list(found.values()), index=pd.Index(list(found), name="series_id", dtype=object), columns=columns)

    def runs(self, **params):
        """The runs, the newest known first: workflow_id, start_known, end_known, limit, …"""
        answer = self._send("GET", "/runs", params={"limit": MOST, **params}).json()
        if answer["more"] and "limit" not in params:
            warnings.warn(f"these are the newest {MOST} runs; end_known asks for those before", stacklevel=2)
        frame = pd.DataFrame(answer["data"])
        return frame.assign(**{c: _times(frame[c]) for c in frame if c.endswith("_time") or c.endswith("_at")})

    def _frame(self, path, **params):
        """What a route answers as CSV, as a frame. No text is taken for a number, for a time or for missing, whatever it is."""
        text = self._send("GET", path, params={**params, "format": "csv"}).content
        header = text[:text.index(b"\n")].decode().split(",")
        texts = [c for c in header if c in TEXTS or "_time" in c]
        numbers = [c for c in header if c not in texts]
        frame = pd.read_csv(io.BytesIO(text), dtype={**dict.fromkeys(texts, object), **dict.fromkeys(numbers, "float64")},
                            keep_default_na=False, na_values=[""], **EXACT)
        for column in header:
            if "_time" in column:
                frame[column] = _times(frame[column])
            elif column == "version":
                frame[column] = frame[column].astype("int64")
            elif column == "tags":
                frame[column] = [json.loads(tags) if isinstance(tags, str) else [] for tags in frame[column]]
        return frame

    def _send(self, method, path, params=None, **request):
        """One request, sent until it is answered, with growing pauses, as long as patience lasts. All requests of this client
        may be sent twice: what was stored the first time is not stored again."""
        params = {name: _parameter(value) for name, value in (params or {}).items()}
        end = time.monotonic() + self.patience
        pause = 1
        while True:
            try:
                response = self.session.request(method, self.url + path, params=params, timeout=TIMEOUT, **request)
                if response.ok:
                    return response
                failure = Refused(response)
                if response.status_code not in BUSY:
                    raise failure
                asked = response.headers.get("Retry-After", "")
                wait = max(pause, int(asked)) if asked.isdigit() else pause
            except NO_ANSWER as error:
                failure = error
                wait = pause
            if time.monotonic() + wait > end:
                raise failure
            time.sleep(wait)
            pause = min(2 * pause, 30)


def _times(column):
    return pd.to_datetime(column, utc=True, **ISO).astype("datetime64[ns, UTC]")  # which holds all years that timedb has


def _parameter(value):
    """A value as it stands in a query."""
    if isinstance(value, (list, tuple)):
        return [_parameter(v) for v in value]
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, bool):
        return str(value).lower()
    if hasattr(value, "total_seconds"):  # a lead or a bucket, of exact hours
        return f"{value.total_seconds()}s"
    return value.isoformat() if hasattr(value, "isoformat") else value


def _plain(value):
    """A value as JSON has it."""
    if isinstance(value, (str, list, tuple, dict)):
        return value
    if pd.isna(value):
        return None
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return value.item() if hasattr(value, "item") else value  # of numpy
