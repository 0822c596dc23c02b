package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math"
	"math/rand"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lib/pq"
)

func TestTimestampsAreReadInEveryDocumentedForm(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	for i, c := range []struct{ in, out string }{
		{"2025-01-01", "2025-01-01T00:00:00+00:00"}, {"2025-01-01T05", ""}, {"2025-01-01T05:30", "2025-01-01T05:30:00+00:00"},
		{"2025-01-01 05:30:01", "2025-01-01T05:30:01+00:00"},
		{"2025-01-01T05:30:01.5", "2025-01-01T05:30:01.500000+00:00"},
		{"2025-01-01T05:30:01.123456789Z", "2025-01-01T05:30:01.123456+00:00"},
		{"2025-01-01T05:30:00+05:30", "2025-01-01T00:00:00+00:00"}, {"2025-01-01T05:30:00 05:30", "2025-01-01T00:00:00+00:00"},
		{"2025-01-01 05:30-01", "2025-01-01T06:30:00+00:00"},
		{"2025-01-01T05:30:00+0100", "2025-01-01T04:30:00+00:00"},
		{"2024-12-31T23:59:59.999999-00:00", "2024-12-31T23:59:59.999999+00:00"},
		{"1677-01-01T00:00:00Z", "1677-01-01T00:00:00+00:00"},
		{"1969-12-31T23:59:59.000001Z", "1969-12-31T23:59:59.000001+00:00"},
		{"2262-12-31T23:59:59.999999Z", "2262-12-31T23:59:59.999999+00:00"},
		{"1999-12-31T23:59:59.75Z", "1999-12-31T23:59:59.750000+00:00"}, {"2024-02-29T12:00Z", "2024-02-29T12:00:00+00:00"},
	} {
		if c.out == "" {
			continue // an hour alone is neither promised nor refused
		}
		name := fmt.Sprintf("s%d", i)
		s.must(t, 200, "POST", "/upload", key, runWith("", strings.Replace(at(c.in, "1"), "load", name, 1)))
		text := s.must(t, 200, "GET", "/values?series_key="+name+"&start_valid="+strings.NewReplacer(" ", "%20").Replace(c.in),
			key, "") // its plus stays bare
		if !strings.Contains(text, `"valid_time":"`+c.out+`"`) {
			t.Errorf("%s comes back in %s, want %s", c.in, text, c.out)
		}
	}
}

func TestRepeatedUploadAnswersTheSameAndStoresNothing(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	body := runWith(`"run_id":"`+strings.ToUpper(nobody)+`",`, at("2025-01-01", "1"), at("2025-01-02", "2"))
	first := s.must(t, 200, "POST", "/upload", key, body)
	if got := mustDecode[uploadAnswer](t, first); got.RunID != nobody || got.Rows != 2 {
		t.Errorf("POST /upload answers %s, want the run_id that was sent", first)
	}
	before := s.stored(t)
	for range 3 {
		if again := s.must(t, 200, "POST", "/upload", key, body); again != first {
			t.Errorf("the same upload again answers %s, first %s", again, first)
		}
	}
	s.must(t, 409, "POST", "/upload", key, strings.Replace(body, `"value":2`, `"value":3`, 1))
	s.must(t, 409, "POST", "/upload", key, strings.Replace(body, `"run_id"`, `"workflow_id":"x","run_id"`, 1))
	s.must(t, 409, "POST", "/upload", key, strings.Replace(body, `"value_key":"load","value":2`, `"value_key":"new","value":2`, 1))
	if s.stored(t) != before {
		t.Error("a repeated upload stored something")
	}
	csv := func(id, value string) (path, body string) {
		return "/upload?run_start_time=2025-01-01&run_id=" + id, "valid_time,value_key,value\n2025-01-01,load," + value + "\n"
	}
	path, text := csv(tenantB, "5")
	first = s.must(t, 200, "POST", path, key, text, "Content-Type: text/csv")
	if again := s.must(t, 200, "POST", path, key, text, "Content-Type: text/csv"); again != first {
		t.Errorf("the same CSV again answers %s, first %s", again, first)
	}
	_, text = csv(tenantB, "6")
	s.must(t, 409, "POST", path, key, text, "Content-Type: text/csv")
	s.must(t, 409, "POST", path+"&workflow_id=x", key, text, "Content-Type: text/csv")
}

func TestConcurrentUploadsMakeOneRunAndOneSeries(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	row := func(name string) string { return strings.Replace(at("2025-01-01", "1"), "load", name, 1) }
	var answers [8]string
	together(8, func(i int) { // the same run: one stores it, all answer the same
		_, answers[i], _ = s.do("POST", "/upload", key, runWith(`"run_id":"`+nobody+`",`, row("x"), row("y")))
	})
	together(8, func(i int) { // other runs that create the same series, in another order
		rows := []string{row("p"), row("q"), row("r")}
		rows[0], rows[i%3] = rows[i%3], rows[0]
		if resp, text, err := s.do("POST", "/upload", key, runWith("", rows...)); err != nil || resp.StatusCode != 200 {
			t.Errorf("%v %v %s", resp, err, text)
		}
	})
	together(8, func(int) {
		if resp, text, err := s.do("POST", "/series", key, `{"name":"s","unit":"MW"}`); err != nil || resp.StatusCode != 200 {
			t.Errorf("%v %v %s", resp, err, text)
		}
	})
	for _, answer := range answers {
		if answer != answers[0] || mustDecode[uploadAnswer](t, answer).RunID != nobody {
			t.Errorf("one of eight equal uploads answers %q, another %q", answer, answers[0])
		}
	}
	if got := s.stored(t); got != "9 6 26 26" {
		t.Errorf("stored %q runs, series, blocks, values, want 9 6 26 26", got)
	}
}

func TestSeriesAreCreatedOncePerNameAndUnit(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	type answer struct {
		ID      string `json:"series_id"`
		Message string `json:"message"`
	}
	first := mustDecode[answer](t, s.must(t, 200, "POST", "/series", key, `{"name":"load","unit":"MW","description":"Load <&> ü"}`))
	again := mustDecode[answer](t, s.must(t, 200, "POST", "/series", key, `{"name":"load","unit":"MW"}`))
	if first.Message != "Series created successfully" || again.Message != "Series already exists" || first.ID != again.ID {
		t.Errorf("POST /series answers %+v, then %+v", first, again)
	}
	s.mustAll(t, key, []httpCase{
		{"POST", "/series", `{"name":"load"}`, 409, []string{"unit"}},
		{"POST", "/series", `{"name":"load","unit":"kW"}`, 409, []string{"unit"}},
		{"POST", "/series", `{"name":" "}`, 422, []string{"name"}}, {"POST", "/series", `{}`, 422, []string{"name"}},
		{"POST", "/series", `{"name":"x","unit":""}`, 422, []string{"unit"}},
		{"POST", "/series", `{"name":5}`, 422, []string{"name"}}, {"POST", "/series", `{"name":"x","extra":1}`, 422, []string{"extra"}},
		{"POST", "/series", `{"name":"x","name":"y"}`, 422, []string{"name"}},
		{"POST", "/series", `{"name":"x\u0000"}`, 422, []string{"name"}},
		{"POST", "/series?x=1", `{"name":"x"}`, 422, []string{"x"}}, {"POST", "/series", `name=x`, 422, []string{"body"}},
		{"POST", "/series", `{"name":"empty"}`, 200, []string{"Series created successfully"}},
		{"GET", "/list_timeseries", ``, 200, []string{`"series_key":"empty"`, `"unit":"dimensionless"`, `"series_key":"load"`}},
		{"GET", "/list_timeseries?x=1", ``, 422, []string{"x"}},
		{"GET", "/values?series_key=empty", ``, 200, []string{`"count":0`, `"data":[]`}},
	})
	// An upload finds a series by its key whatever its unit, or by its id.
	got := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", key, runWith("", at("2025-01-01", "1"),
		`{"valid_time":"2025-01-02","series_id":"`+strings.ToUpper(first.ID)+`","value":2}`,
		`{"valid_time":"2025-01-03","series_id":"`+first.ID+`","value_key":"load","value":3}`)))
	if len(got.SeriesIDs) != 1 || got.SeriesIDs["load"] != first.ID || got.Rows != 3 {
		t.Errorf("POST /upload by key and by id answers %+v", got)
	}
	if text := s.must(t, 200, "GET", "/values", key, ""); strings.Count(text, `"series_unit":"MW"`) != 3 {
		t.Errorf("GET /values: %s", text)
	}
}

func TestLongSeriesComeBackExactly(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	special := []float64{0.1, 1e-7, 1e300, 5e-324, math.MaxFloat64, -math.MaxFloat64, 1 / 3.0, 0, 1e15, 1e16,
		123456789.123456789, 1e21, 0.0001, 0.00001, 9007199254740993}
	begin := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	var times []time.Time
	for i := range 2500 { // over a thousand values, and over 32 days
		times = append(times, begin.Add(time.Duration(i)*time.Hour))
	}
	for _, gap := range []time.Duration{0, 32*24*time.Hour - time.Microsecond, 32 * 24 * time.Hour, 32*24*time.Hour + time.Microsecond} {
		times = append(times, begin.AddDate(3, 0, 0).Add(gap))
	}
	for i := range 1001 {
		times = append(times, begin.AddDate(10, 0, 0).Add(time.Duration(i)*time.Microsecond))
	}
	value := func(i int) float64 {
		if i < len(special) {
			return special[i]
		}
		return math.Ldexp(float64(i*i*7919%1_000_003), -i%40)
	}
	rows := make([]string, len(times))
	for i, at := range times {
		rows[i] = fmt.Sprintf(`{"valid_time":%q,"value_key":"load","value":%s}`, at.Format(time.RFC3339Nano),
			strconv.FormatFloat(value(i), 'g', -1, 64))
	}
	rand.Shuffle(len(rows), func(i, j int) { rows[i], rows[j] = rows[j], rows[i] })
	s.must(t, 200, "POST", "/upload", key, runWith("", rows...))
	type answer struct {
		Count int
		Data  []struct {
			At    time.Time `json:"valid_time"`
			Value float64
		}
	}
	got := mustDecode[answer](t, s.must(t, 200, "GET", "/values", key, ""))
	if got.Count != len(times) || len(got.Data) != len(times) {
		t.Fatalf("%d rows and a count of %d, want %d", len(got.Data), got.Count, len(times))
	}
	for i, row := range got.Data {
		if !row.At.Equal(times[i]) || row.Value != value(i) {
			t.Fatalf("row %d is %v, want %v %v", i, row, times[i], value(i))
		}
	}
	for range 200 { // any window shows just what lies in it
		i := rand.Intn(len(times))
		j := i + rand.Intn(min(1500, len(times)-i))
		query := fmt.Sprintf("/values?start_valid=%s&end_valid=%s", url.QueryEscape(times[i].Format(time.RFC3339Nano)),
			url.QueryEscape(times[j].Add(time.Microsecond).Format(time.RFC3339Nano)))
		part := mustDecode[answer](t, s.must(t, 200, "GET", query, key, ""))
		if part.Count != j-i+1 || !part.Data[0].At.Equal(times[i]) || !part.Data[j-i].At.Equal(times[j]) {
			t.Fatalf("%s: %d rows, want %d", query, part.Count, j-i+1)
		}
	}
}

// mustPicture uploads what the tests of this part read: two runs of load known at different times, a third known when the
// second was, an interval series, and a correction of one value.
func mustPicture(t *testing.T, s *testServer) (key string, series map[string]string) {
	t.Helper()
	key = s.mustUser(t, tenantA, "a@example.com")
	series = map[string]string{}
	row := func(name, hour, value string, more ...string) string {
		return strings.Replace(at("2025-01-01T"+hour+":00:00Z", value, more...), "load", name, 1)
	}
	end := func(hour string) string { return `,"valid_time_end":"2025-01-01T` + hour + `:00:00Z"` }
	for i, rows := range [][]string{
		{row("load", "00", "1"), row("load", "01", "2"), row("load", "02", "null"), row("wind", "00", "0.5")},
		{row("load", "03", "4.5"), row("load", "01", "2.5"), row("load", "02", "3.5"), row("price", "00", "20", end("02")),
			row("price", "00", "10", end("01"))},
		{row("load", "03", "9")},
	} {
		known := []string{"2024-12-31T00:00:00Z", "2024-12-31T12:00:00Z", "2024-12-31T12:00:00Z"}[i]
		got := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", key, runWith(`"known_time":"`+known+`",`, rows...)))
		for name, id := range got.SeriesIDs {
			series[name] = id
		}
	}
	s.must(t, 200, "PUT", "/values", key, `{"updates":[{"series_key":"load","valid_time":"2025-01-01T02:00:00Z","value":3.75,"annotation":"checked","tags":["a","b"]}]}`)
	return key, series
}

// brief is a read in short: each row as "known/key hour[-end]=value", known and end as hours, too.
func brief(t *testing.T, text string) string {
	t.Helper()
	got := mustDecode[readAnswer](t, text)
	if got.Count != len(got.Data) {
		t.Errorf("count is %d for %d rows", got.Count, len(got.Data))
	}
	var rows []string
	for _, r := range got.Data {
		row := r.Key + " " + r.Valid.Format("15")
		if r.Known != nil {
			row = r.Known.Format("15") + "/" + row
		}
		if r.End != nil {
			row += "-" + r.End.Format("15")
		}
		if row += "=null"; r.Value != nil {
			row = strings.TrimSuffix(row, "null") + strconv.FormatFloat(*r.Value, 'g', -1, 64)
		}
		if r.Version > 0 {
			row += fmt.Sprintf(" v%d", r.Version)
		}
		rows = append(rows, row)
	}
	return strings.Join(rows, ", ")
}

func TestReadsShowWhatTheParametersAskFor(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, series := mustPicture(t, s)
	const flat = "load 00=1, load 01=2.5, load 02=3.75, load 03=9, price 00-01=10, price 00-02=20, wind 00=0.5"
	for query, want := range map[string]string{
		"":                                 flat,
		"mode=flat&all_versions=false":     flat,
		"mode=overlapping&series_key=load": "00/load 00=1, 00/load 01=2, 00/load 02=null, 12/load 01=2.5, 12/load 02=3.75, 12/load 03=4.5, 12/load 03=9",
		"mode=overlapping&series_key=wind&series_id=" + series["price"]:                   "12/price 00-01=10, 12/price 00-02=20, 00/wind 00=0.5",
		"series_id=" + series["wind"] + "&series_id=" + strings.ToUpper(series["wind"]):   "wind 00=0.5",
		"series_key=wind&series_id=" + series["wind"]:                                     "wind 00=0.5",
		"series_key=load&start_valid=2025-01-01T01:00:00Z&end_valid=2025-01-01T03:00:00Z": "load 01=2.5, load 02=3.75",
		"start_valid=2025-01-01T00:00:01Z&series_key=price":                               "",
		"end_valid=2025-01-01T00:00:00Z":                                                  "",
		"end_known=2024-12-31T12:00:00Z&series_key=load":                                  "load 00=1, load 01=2, load 02=null",
		"start_known=2024-12-31T12:00:00Z&series_key=load":                                "load 01=2.5, load 02=3.75, load 03=9",
		"start_known=2025-01-01":                                                          "",
		"series_key=load&all_versions=true&start_valid=2025-01-01T02:00:00Z":              "00/load 02=null v1, 12/load 02=3.5 v1, 12/load 02=3.75 v2, 12/load 03=4.5 v1, 12/load 03=9 v1",
		"series_key=load&lead=PT24H":                                                      "load 00=1, load 01=2, load 02=null",
		"series_key=load&lead=13h":                                                        "load 00=1, load 01=2.5, load 02=3.75, load 03=9",
		"series_key=load&lead=PT13H0.000001S":                                             "load 00=1, load 01=2, load 02=3.75, load 03=9",
		"lead=P1DT1H&series_key=load":                                                     "load 01=2, load 02=null",
		"lead=P1W":                                                                        "",
		"bucket=PT2H&agg=mean&series_key=load":                                            "load 00=1.75, load 02=6.375",
		"bucket=2h&agg=min&series_key=load":                                               "load 00=1, load 02=3.75",
		"bucket=P1D&agg=max":                                                              "load 00=9, price 00=20, wind 00=0.5",
		"bucket=P1D&agg=sum":                                                              "load 00=16.25, price 00=30, wind 00=0.5",
		"bucket=P1D&agg=count&end_known=2024-12-31T12:00:00Z":                             "load 00=2, wind 00=1",
		"bucket=PT1H&agg=mean&series_key=load&end_known=2024-12-31T12:00:00Z":             "load 00=1, load 01=2",
		"bucket=90m&agg=max&series_key=load&start_valid=2025-01-01T01:00:00Z":             "load 00=2.5, load 01=3.75, load 03=9",
		"bucket=PT1H&agg=count&series_key=load&limit=2":                                   "load 00=1, load 01=1",
		"limit=3":                    "load 00=1, load 01=2.5, load 02=3.75",
		"limit=1000&series_key=wind": "wind 00=0.5",
		"as_of=2020-01-01":           "",
	} {
		if got := brief(t, s.must(t, 200, "GET", "/values?"+query, key, "")); got != want {
			t.Errorf("GET /values?%s\nshows %s\nwant  %s", query, got, want)
		}
	}
	for _, query := range []string{"series_key=nope", "series_id=" + nobody, "series_key=load&series_key=nope",
		"as_of=2020-01-01&series_key=load"} {
		s.must(t, 404, "GET", "/values?"+query, key, "")
	}
	for query, field := range map[string]string{
		"nope=1": "nope", "Mode=flat": "Mode", "mode=": "mode", "mode=both": "mode", "mode=flat&mode=flat": "mode",
		"series_id=x": "series_id", "start_valid=x": "start_valid", "end_valid=": "end_valid",
		"start_known=2025-13-01": "start_known", "end_known=x": "end_known", "as_of=x": "as_of",
		"start_valid=2025-01-02&end_valid=2025-01-02": "valid",
		"start_known=2025-01-02&end_known=2025-01-01": "known", "all_versions=perhaps": "all_versions", "detail=2": "detail",
		"limit=0": "limit", "limit=-1": "limit", "limit=x": "limit", "limit=1e3": "limit",
		"series_key=": "series_key", "series_id=": "series_id", "start_valid=%zz": "query",
		"lead=x": "lead", "lead=P1M": "lead", "lead=": "lead", "lead=-1h": "lead", "lead=P": "lead", "lead=PT": "lead",
		"bucket=PT1H": "agg", "agg=mean": "bucket", "bucket=PT1H&agg=median": "agg", "bucket=0s&agg=mean": "bucket",
		"bucket=-1h&agg=mean": "bucket", "bucket=1ns&agg=mean": "bucket", "bucket=P300000D&agg=mean": "bucket",
		"bucket=PT1H&agg=mean&mode=overlapping": "bucket", "bucket=PT1H&agg=mean&all_versions=true": "bucket",
		"bucket=PT1H&agg=mean&detail=true": "bucket", "format=xml": "format",
	} {
		if text := s.must(t, 422, "GET", "/values?"+query, key, ""); !strings.Contains(text, field) {
			t.Errorf("GET /values?%s: %s, want %s in it", query, text, field)
		}
	}
}

func TestOverlappingRunsOfOneKnownTimeAreOrderedByValidTime(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	const known = `"known_time":"2025-01-01T00:00:00Z",`
	s.must(t, 200, "POST", "/upload", key, runWith(known, at("2025-01-01T00:00:00Z", "1"), at("2025-01-01T02:00:00Z", "2")))
	s.must(t, 200, "POST", "/upload", key, runWith(known, at("2025-01-01T01:00:00Z", "3"), at("2025-01-01T03:00:00Z", "4")))
	const want = "00/load 00=1, 00/load 01=3, 00/load 02=2, 00/load 03=4"
	if got := brief(t, s.must(t, 200, "GET", "/values?mode=overlapping", key, "")); got != want {
		t.Errorf("GET /values?mode=overlapping\nshows %s\nwant  %s (series_key, known_time, valid_time)", got, want)
	}
}

func TestFirstUploadIsThereAsOfItsOwnChangeTime(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	for i := range 20 {
		name := fmt.Sprint("series", i)
		s.must(t, 200, "POST", "/upload", key, `{"run_start_time":"2025-01-01","value_rows":[{"valid_time":"2025-01-01","value_key":"`+name+`","value":1}]}`)
		detail := mustDecode[struct {
			Data []struct {
				Change string `json:"change_time"`
			}
		}](t, s.must(t, 200, "GET", "/values?detail=true&series_key="+name, key, ""))
		asOf := url.QueryEscape(detail.Data[0].Change)
		if got := mustDecode[readAnswer](t, s.must(t, 200, "GET", "/values?series_key="+name+"&as_of="+asOf, key, "")); got.Count != 1 {
			t.Fatalf("as of its own change_time %s the upload has %d values", asOf, got.Count)
		}
	}
}

// A history is some uploads and corrections of one tenant, done over HTTP and mirrored in the plainest possible model:
// a list of every version ever written. Times are microseconds since 1970; end 0 means that there is none.
type history struct {
	s        *testServer
	rng      *rand.Rand
	tenant   string
	keys     [2]string // of two users
	runs     []modelRun
	versions []modelVersion
	series   map[string]modelSeries
	moments  []modelMoment
}

type modelRun struct {
	id    string
	known int64
}

type modelSeries struct {
	id   string
	born int // how many moments there were before it
}

type modelVersion struct {
	series   string
	run      int // an index: the order of insertion
	time     int64
	end      int64
	value    *float64
	note, by string
	tags     []string
	number   int
}

// modelMoment is a time by the database's clock, how much there was then, and what a read answered then.
type modelMoment struct {
	at       string
	versions int
	query    url.Values
	answer   string
}

const (
	hour     = int64(time.Hour / time.Microsecond)
	modelDay = int64(1_735_689_600_000_000) // 2025-01-01
)

func iso(t int64) string { return time.UnixMicro(t).UTC().Format("2006-01-02T15:04:05.999999-07:00") }

var modelSeed = flag.Int64("seed", 0, "the first history's seed in TestReadsAgreeWithNaiveModel; 0: a random one")

func TestReadsAgreeWithNaiveModel(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	s.db.SetMaxIdleConns(16)
	base := cmp.Or(*modelSeed, rand.Int63())
	var next, failed atomic.Int64
	together(8, func(int) {
		for i := next.Add(1) - 1; i < int64(*histories) && failed.Load() < 3; i = next.Add(1) - 1 {
			h := &history{s: s, rng: rand.New(rand.NewSource(base + i)), series: map[string]modelSeries{}}
			if err := h.play(); err != nil {
				failed.Add(1)
				t.Errorf("%v\nagain: go test -run TestReadsAgreeWithNaiveModel -histories 1 -seed %d", err, base+i)
			}
		}
	})
}

func (h *history) play() error {
	h.tenant = fmt.Sprintf("%08x-%04x-4000-8000-%012x", h.rng.Uint32(), h.rng.Intn(1<<16), h.rng.Int63n(1<<48))
	for i := range h.keys {
		key, id, _ := newKey()
		digest := sha256.Sum256([]byte(key))
		h.keys[i] = key
		if _, err := h.s.db.Exec(`INSERT INTO users_table (tenant_id, email, key_id, key_digest) VALUES ($1, $2, $3, $4)`,
			h.tenant, h.email(i), id, digest[:]); err != nil {
			return err
		}
	}
	for step := range 2 + h.rng.Intn(5) {
		act := h.correct
		if step == 0 || h.rng.Intn(2) == 0 {
			act = h.upload
		}
		if err := act(h.rng.Intn(2)); err != nil {
			return err
		}
		m := modelMoment{versions: len(h.versions)}
		if err := h.s.db.QueryRow(`SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')`).Scan(&m.at); err != nil {
			return err
		}
		m.query = h.question()
		var err error
		if m.answer, err = h.compare(m.query, len(h.versions), len(h.moments)); err != nil {
			return err
		}
		h.moments = append(h.moments, m)
	}
	for i, m := range h.moments { // every moment's answer can be had again
		m.query.Set("as_of", m.at)
		if _, again, err := h.s.do("GET", "/values?"+m.query.Encode(), h.keys[0], ""); err != nil || again != m.answer {
			return fmt.Errorf("GET /values?%s\nanswers  %s\nanswered %s at that moment (%v)", m.query.Encode(), again, m.answer, err)
		}
		query := h.question()
		query.Set("as_of", m.at)
		if _, err := h.compare(query, m.versions, i); err != nil {
			return err
		}
	}
	return nil
}

func (h *history) email(user int) string { return fmt.Sprintf("user%d@example.com", user) }

// pick returns a random one.
func pick[T any](rng *rand.Rand, from ...T) T { return from[rng.Intn(len(from))] }

func (h *history) point() (t, end int64) {
	t = modelDay + int64(h.rng.Intn(8))*hour
	if h.rng.Intn(10) == 0 {
		t += 40 * 24 * hour
	}
	return t, pick(h.rng, 0, 0, 0, t+hour, t+2*hour)
}

func (h *history) value() *float64 {
	if h.rng.Intn(6) == 0 {
		return nil
	}
	f := float64(h.rng.Intn(4)) * 0.5
	return &f
}

// upload sends a random run.
func (h *history) upload(user int) error {
	body := map[string]any{"run_start_time": "2025-01-01"}
	run := modelRun{known: modelDay - int64(h.rng.Intn(4))*6*hour}
	nowKnown := h.rng.Intn(10) == 0
	if !nowKnown {
		body["known_time"] = iso(run.known)
	}
	var rows []map[string]any
	taken := map[string]bool{}
	add := func(name string, t, end int64) {
		v := modelVersion{series: name, run: len(h.runs), time: t, end: end, value: h.value(), by: h.email(user), number: 1}
		if place := fmt.Sprint(name, t, end); taken[place] {
			return
		} else {
			taken[place] = true
		}
		row := map[string]any{"valid_time": h.when(t), "value": v.value}
		if end != 0 {
			row["valid_time_end"] = h.when(end)
		}
		if x, known := h.series[name]; known && h.rng.Intn(2) == 0 {
			row["series_id"] = x.id
		} else {
			row["value_key"] = name
		}
		rows, h.versions = append(rows, row), append(h.versions, v)
	}
	for range 1 + h.rng.Intn(8) {
		t, end := h.point()
		add(pick(h.rng, "a", "b", "c"), t, end)
	}
	if h.rng.Intn(100) == 0 { // more than one block
		for i := range int64(1100) {
			add("a", modelDay+i*hour/60, 0)
		}
	}
	path, text, header := h.written(body, rows)
	resp, answer, err := h.s.do("POST", path, h.keys[user], text, header...)
	var got uploadAnswer
	if err != nil || resp.StatusCode != 200 || json.Unmarshal([]byte(answer), &got) != nil {
		return fmt.Errorf("POST /upload %s: %v %v %s", text, resp, err, answer)
	}
	for name, id := range got.SeriesIDs {
		if x, known := h.series[name]; !known {
			h.series[name] = modelSeries{id, len(h.moments)}
		} else if x.id != id {
			return fmt.Errorf("series %s became another", name)
		}
	}
	if run.id = got.RunID; nowKnown {
		err = h.s.db.QueryRow(`SELECT (extract(epoch FROM known_time) * 1000000)::bigint FROM runs_table WHERE tenant_id = $1 AND run_id = $2`, h.tenant, run.id).Scan(&run.known)
	}
	h.runs = append(h.runs, run)
	return err
}

// when writes a time in one of the ways that mean the same instant.
func (h *history) when(t int64) string {
	at := time.UnixMicro(t).In(time.FixedZone("", pick(h.rng, 2*3600, -(3*3600+1800))))
	return pick(h.rng, iso(t), at.Format(time.RFC3339Nano), at.UTC().Format("2006-01-02 15:04:05.999999"))
}

// written makes a request of an upload: as JSON or as CSV, packed or not. All must store the same.
func (h *history) written(run map[string]any, rows []map[string]any) (path, text string, header []string) {
	path = "/upload"
	if h.rng.Intn(2) == 0 {
		run["value_rows"] = rows
		body, _ := json.Marshal(run)
		text = string(body)
	} else {
		query, lines := url.Values{}, []string{"series_id,valid_time,value,value_key,valid_time_end"}
		for name, value := range run {
			query.Set(name, value.(string))
		}
		for _, row := range rows {
			cells := []string{}
			for _, name := range strings.Split(lines[0], ",") {
				cell := ""
				if f, isNumber := row[name].(*float64); isNumber && f != nil {
					cell = fmt.Sprint(*f)
				} else if isNumber {
					cell = pick(h.rng, "", "NaN")
				} else if row[name] != nil {
					cell = row[name].(string)
				}
				cells = append(cells, cell)
			}
			lines = append(lines, strings.Join(cells, ","))
		}
		path, text, header = path+"?"+query.Encode(), strings.Join(lines, "\n"), []string{"Content-Type: text/csv"}
	}
	if h.rng.Intn(3) == 0 {
		text, header = gzipped(text), append(header, "Content-Encoding: gzip")
	}
	return path, text, header
}

// later tells whether v counts rather than w, of versions of one series and time.
func (h *history) later(v, w modelVersion) bool {
	return cmp.Or(cmp.Compare(h.runs[v.run].known, h.runs[w.run].known), cmp.Compare(v.run, w.run), cmp.Compare(v.number, w.number)) > 0
}

type modelUpdate struct {
	SeriesID  string           `json:"series_id,omitempty"`
	SeriesKey string           `json:"series_key,omitempty"`
	Time      string           `json:"valid_time"`
	End       *string          `json:"valid_time_end,omitempty"`
	RunID     string           `json:"run_id,omitempty"`
	Known     *string          `json:"known_time,omitempty"`
	Value     *json.RawMessage `json:"value,omitempty"`
	Note      *json.RawMessage `json:"annotation,omitempty"`
	Tags      *json.RawMessage `json:"tags,omitempty"`
}

// update makes a random update, and returns the version that it would write and its status: 200, 404 or 422. same tells
// that it changes nothing.
func (h *history) update(user int) (u modelUpdate, next modelVersion, same bool, status int) {
	v := pick(h.rng, h.versions...)
	name, t, end := v.series, v.time, v.end
	if h.rng.Intn(4) == 0 {
		t, end = h.point()
	}
	if h.rng.Intn(20) == 0 {
		name = pick(h.rng, "a", "b", "c", "unknown")
	}
	u.Time = h.when(t)
	if end != 0 {
		text := h.when(end)
		u.End = &text
	}
	x, seriesKnown := h.series[name]
	if u.SeriesKey = name; seriesKnown && h.rng.Intn(2) == 0 {
		u.SeriesKey, u.SeriesID = "", x.id
	}
	run := pick(h.rng, h.runs...)
	known := run.known
	if named := h.rng.Intn(5); named == 1 || named == 3 {
		u.RunID = pick(h.rng, run.id, run.id, run.id, run.id, run.id, run.id, nobody)
	}
	if named := h.rng.Intn(5); named == 2 || named == 3 {
		known = pick(h.rng, known, known, known, modelDay-6*hour, modelDay+1)
		text := h.when(known)
		u.Known = &text
	}
	raw := func(v any) *json.RawMessage {
		text, _ := json.Marshal(v)
		return (*json.RawMessage)(&text)
	}
	value, note := h.value(), pick(h.rng, any("x"), any(" y "), any("  "), nil)
	tags := pick(h.rng, []string{}, nil, []string{" B", "a", "A "}, []string{"c"})
	mask := 1 + h.rng.Intn(7)
	if mask&1 != 0 {
		u.Value = raw(value)
	}
	if mask&2 != 0 {
		u.Note = raw(note)
	}
	if mask&4 != 0 {
		u.Tags = raw(tags)
	}

	if !seriesKnown {
		return u, next, false, 404
	}
	var found *modelVersion
	for i := range h.versions {
		w := &h.versions[i]
		if w.series == name && w.time == t && w.end == end && (u.RunID == "" || h.runs[w.run].id == u.RunID) &&
			(u.Known == nil || h.runs[w.run].known == known) && (found == nil || h.later(*w, *found)) {
			found = w
		}
	}
	if found != nil {
		next = *found
	} else {
		next = modelVersion{series: name, run: -1, time: t, end: end}
		for i, r := range h.runs {
			if (u.RunID != "" || u.Known != nil) && (u.RunID == "" || r.id == u.RunID) && (u.Known == nil || r.known == known) {
				next.run = i
			}
		}
		switch {
		case next.run < 0:
			return u, next, false, 404
		case u.Value == nil:
			return u, next, false, 422
		}
	}
	if u.Value != nil {
		next.value = value
	}
	if u.Note != nil {
		text, _ := note.(string)
		next.note = strings.TrimSpace(text)
	}
	if u.Tags != nil {
		next.tags = map[int][]string{3: {"a", "b"}, 1: {"c"}, 0: nil}[len(tags)]
	}
	if found != nil && (next.value == nil) == (found.value == nil) && (next.value == nil || *next.value == *found.value) &&
		next.note == found.note && slices.Equal(next.tags, found.tags) {
		return u, next, true, 200
	}
	next.by = h.email(user)
	next.number++
	return u, next, false, 200
}

// correct sends a random batch of updates.
func (h *history) correct(user int) error {
	var sent []modelUpdate
	var refused []int
	type change struct {
		modelVersion
		same bool
	}
	var changes []change
	last := map[string]int{}
	place := func(v modelVersion) string { return fmt.Sprint(v.series, v.run, v.time, v.end) }
	for range 1 + h.rng.Intn(4) {
		u, next, same, status := h.update(user)
		sent = append(sent, u)
		if status != 200 {
			refused = append(refused, status)
		}
		last[place(next)] = len(changes)
		changes = append(changes, change{next, same})
	}
	text, _ := json.Marshal(map[string]any{"updates": sent})
	resp, answer, err := h.s.do("PUT", "/values", h.keys[user], string(text))
	if err != nil {
		return err
	}
	if len(refused) > 0 {
		if !slices.Contains(refused, resp.StatusCode) {
			return fmt.Errorf("PUT /values %s: status %d, want one of %v: %s", text, resp.StatusCode, refused, answer)
		}
		return nil
	}
	var want, got [2][]string // updated, skipped
	for i, c := range changes {
		if last[place(c.modelVersion)] != i {
			continue // the last of two equal keys wins
		}
		line := fmt.Sprint(h.runs[c.run].id, h.tenant, iso(c.time), h.series[c.series].id, c.number, !c.same)
		if c.same {
			want[1] = append(want[1], line)
		} else {
			want[0] = append(want[0], line)
			h.versions = append(h.versions, c.modelVersion)
		}
	}
	type result struct {
		Run     string    `json:"run_id"`
		Tenant  string    `json:"tenant_id"`
		Time    time.Time `json:"valid_time"`
		Series  string    `json:"series_id"`
		ID      *int64    `json:"value_id"`
		Version int       `json:"version"`
	}
	var body struct {
		Updated []result `json:"updated"`
		Skipped []result `json:"skipped_no_ops"`
	}
	if err := json.Unmarshal([]byte(answer), &body); err != nil || resp.StatusCode != 200 || body.Updated == nil || body.Skipped == nil {
		return fmt.Errorf("PUT /values %s: status %d: %s", text, resp.StatusCode, answer)
	}
	for i, list := range [][]result{body.Updated, body.Skipped} {
		for _, r := range list {
			got[i] = append(got[i], fmt.Sprint(r.Run, r.Tenant, iso(r.Time.UnixMicro()), r.Series, r.Version, r.ID != nil))
		}
		slices.Sort(got[i])
		slices.Sort(want[i])
		if !slices.Equal(got[i], want[i]) {
			return fmt.Errorf("PUT /values %s\nanswers %s\nwant updated %q, skipped %q", text, answer, want[0], want[1])
		}
	}
	return nil
}

// question makes a random query.
func (h *history) question() url.Values {
	q := url.Values{}
	chance := func(percent int) bool { return h.rng.Intn(100) < percent }
	if chance(40) {
		start := modelDay + int64(h.rng.Intn(6))*hour
		q.Set("start_valid", iso(start))
		if chance(60) {
			q.Set("end_valid", iso(start+int64(1+h.rng.Intn(5))*hour))
		}
	}
	if chance(20) {
		q.Set("start_known", iso(modelDay-int64(h.rng.Intn(4))*6*hour))
	}
	if chance(20) {
		q.Set("end_known", iso(modelDay+1-int64(h.rng.Intn(3))*6*hour))
		if q.Get("end_known") <= q.Get("start_known") {
			q.Del("start_known")
		}
	}
	if chance(20) {
		q.Set("lead", pick(h.rng, "1h", "PT6H", "P1D", "PT20H30M", "0s"))
	}
	for range h.rng.Intn(3) {
		name := pick(h.rng, "a", "b", "c")
		if x, known := h.series[name]; known && chance(50) {
			q.Add("series_id", x.id)
		} else {
			q.Add("series_key", name)
		}
	}
	if chance(20) {
		q.Set("bucket", pick(h.rng, "2h", "PT3H", "P1D", "7m", "P1W"))
		q.Set("agg", pick(h.rng, "mean", "min", "max", "sum", "count"))
		return q
	}
	for name, value := range map[string]string{"mode": pick(h.rng, "flat", "overlapping"),
		"detail": pick(h.rng, "true", "false"), "all_versions": pick(h.rng, "true", "false", "false")} {
		if value != "false" {
			q.Set(name, value)
		}
	}
	return q
}

// expect is what the model answers to q when it knew so many versions and moments; false means 404.
func (h *history) expect(q url.Values, versions, moments int) ([]string, bool) {
	wanted := map[string]bool{}
	for name, x := range h.series {
		if len(q["series_id"])+len(q["series_key"]) == 0 || slices.Contains(q["series_id"], x.id) ||
			slices.Contains(q["series_key"], name) {
			wanted[name] = true
		}
		if slices.Contains(q["series_id"], x.id) && x.born > moments {
			return nil, false
		}
	}
	for _, name := range q["series_key"] {
		if x, known := h.series[name]; !known || x.born > moments {
			return nil, false
		}
	}
	bound := func(name string, otherwise int64) int64 {
		if t, err := time.Parse(time.RFC3339Nano, q.Get(name)); err == nil {
			return t.UnixMicro()
		}
		return otherwise
	}
	lead, asked := map[string]int64{"1h": hour, "PT6H": 6 * hour, "P1D": 24 * hour, "PT20H30M": 41 * hour / 2, "0s": 0}[q.Get("lead")]
	if !asked {
		lead = math.MinInt64
	}
	overlapping, all := q.Get("mode") == "overlapping", q.Get("all_versions") == "true"
	best := map[string]modelVersion{}
	for i, v := range h.versions[:versions] {
		known := h.runs[v.run].known
		if !wanted[v.series] || v.time < bound("start_valid", math.MinInt64) || v.time >= bound("end_valid", math.MaxInt64) ||
			known < bound("start_known", math.MinInt64) || known >= bound("end_known", math.MaxInt64) || v.time-known < lead {
			continue
		}
		rival := fmt.Sprint(v.series, v.time, v.end)
		if all {
			rival = strconv.Itoa(i)
		} else if overlapping {
			rival += fmt.Sprint(" of run ", v.run)
		}
		if w, is := best[rival]; !is || h.later(v, w) {
			best[rival] = v
		}
	}
	if q.Has("bucket") {
		return h.buckets(q, best), true
	}
	var lines []string
	for _, v := range best {
		row := answerRow{Key: v.series, Series: h.series[v.series].id, Valid: time.UnixMicro(v.time), Value: v.value}
		if end := time.UnixMicro(v.end); v.end != 0 {
			row.End = &end
		}
		known := time.UnixMicro(h.runs[v.run].known)
		if overlapping || all || q.Get("detail") == "true" {
			row.Known = &known
		}
		if all || q.Get("detail") == "true" {
			row.Run, row.Version, row.ChangedBy, row.Tags = h.runs[v.run].id, v.number, &v.by, v.tags
			if v.note != "" {
				row.Annotation = &v.note
			}
		}
		lines = append(lines, row.line())
	}
	return lines, true
}

// buckets aggregates what a flat read shows. The values are multiples of a half, so sums do not depend on their order.
func (h *history) buckets(q url.Values, shown map[string]modelVersion) []string {
	width := map[string]int64{"2h": 2 * hour, "PT3H": 3 * hour, "P1D": 24 * hour, "7m": 7 * hour / 60, "P1W": 168 * hour}[q.Get("bucket")]
	type place struct {
		series string
		start  int64
	}
	values := map[place][]float64{}
	for _, v := range shown {
		if v.value != nil {
			p := place{v.series, v.time - v.time%width}
			values[p] = append(values[p], *v.value)
		}
	}
	var lines []string
	for p, list := range values {
		sum := 0.0
		for _, f := range list {
			sum += f
		}
		value := map[string]float64{"mean": sum / float64(len(list)), "min": slices.Min(list), "max": slices.Max(list), "sum": sum,
			"count": float64(len(list))}[q.Get("agg")]
		row := answerRow{Key: p.series, Series: h.series[p.series].id, Valid: time.UnixMicro(p.start), Value: &value}
		lines = append(lines, row.line())
	}
	return lines
}

// line is all of a row but when it was changed, so that equal rows have equal lines.
func (r answerRow) line() string {
	text := func(v any) string {
		b, _ := json.Marshal(v)
		return string(b)
	}
	when := func(t *time.Time) string {
		if t == nil {
			return "-"
		}
		return iso(t.UnixMicro())
	}
	return strings.Join([]string{r.Key, when(&r.Valid), when(r.End), text(r.Value), r.Series, when(r.Known), r.Run,
		strconv.Itoa(r.Version), text(r.ChangedBy), text(r.Annotation), strings.Join(r.Tags, ",")}, " ")
}

// compare asks the server and the model the same, and returns the server's answer.
func (h *history) compare(q url.Values, versions, moments int) (string, error) {
	wanted, found := h.expect(q, versions, moments)
	resp, text, err := h.s.do("GET", "/values?"+q.Encode(), h.keys[0], "")
	if err != nil || found != (resp.StatusCode == 200) || !found && resp.StatusCode != 404 {
		return "", fmt.Errorf("GET /values?%s: %v %v %s, want found %v", q.Encode(), resp, err, text, found)
	}
	if !found {
		return text, nil
	}
	var got readAnswer
	var raw struct{ Data []json.RawMessage }
	if err := cmp.Or(json.Unmarshal([]byte(text), &got), json.Unmarshal([]byte(text), &raw)); err != nil {
		return "", err
	}
	lines := make([]string, len(got.Data))
	for i, r := range got.Data {
		lines[i] = r.line()
		if i > 0 && !inOrder(q, got.Data[i-1], r) {
			return "", fmt.Errorf("GET /values?%s: out of order: %s, then %s", q.Encode(), lines[i-1], lines[i])
		}
	}
	slices.Sort(lines)
	slices.Sort(wanted)
	if !slices.Equal(lines, wanted) || got.Count != len(lines) {
		return "", fmt.Errorf("GET /values?%s\nshows %d rows %q\nwant  %d rows %q", q.Encode(), got.Count, lines, len(wanted), wanted)
	}
	if len(lines) > 1 && h.rng.Intn(4) == 0 { // a limit shows the first rows of the same
		limit := 1 + h.rng.Intn(len(lines))
		var part struct{ Data []json.RawMessage }
		_, limited, err := h.s.do("GET", fmt.Sprintf("/values?%s&limit=%d", q.Encode(), limit), h.keys[0], "")
		if err != nil || json.Unmarshal([]byte(limited), &part) != nil || len(part.Data) != limit ||
			!slices.EqualFunc(part.Data, raw.Data[:limit], func(a, b json.RawMessage) bool { return bytes.Equal(a, b) }) {
			return "", fmt.Errorf("GET /values?%s with limit=%d: %v %s\nwithout %s", q.Encode(), limit, err, limited, text)
		}
	}
	return text, nil
}

// inOrder tells whether b may follow a. Of overlapping runs known at one time each is in order by itself;
// TestOverlappingRunsOfOneKnownTimeAreOrderedByValidTime says more.
func inOrder(q url.Values, a, b answerRow) bool {
	order := strings.Compare(a.Key, b.Key)
	if q.Get("mode") == "overlapping" {
		if order = cmp.Or(order, a.Known.Compare(*b.Known)); order == 0 && a.Run != b.Run || a.Run == "" {
			return order <= 0
		}
	}
	order = cmp.Or(order, a.Valid.Compare(b.Valid))
	if q.Get("all_versions") == "true" {
		order = cmp.Or(order, cmp.Compare(a.Version, b.Version))
	}
	return order <= 0
}

// update is an entry of PUT /values on load at midnight, with these members.
func update(members string) string {
	return `{"updates":[{"series_key":"load","valid_time":"2025-01-01T00:00:00Z",` + members + `}]}`
}

func TestCorrectionKeepsWhatIsAbsentAndClearsWhatIsNull(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, second := s.mustUser(t, tenantA, "a@example.com"), s.mustUser(t, tenantA, "b@example.com")
	s.must(t, 200, "POST", "/upload", key, oneValue)
	version := 1
	for _, c := range []struct{ members, want string }{ // value, annotation, tags after it; "" if it changes nothing
		{`"annotation":"  checked by hand  "`, `1 "checked by hand" null`}, {`"value":1`, ``},
		{`"annotation":"checked by hand","value":1.0`, ``},
		{`"tags":["b"," A ","a","B"]`, `1 "checked by hand" ["a","b"]`}, {`"tags":["A","b"]`, ``},
		{`"value":2.5`, `2.5 "checked by hand" ["a","b"]`},
		{`"value":null`, `null "checked by hand" ["a","b"]`}, {`"value":null,"tags":["b","a"]`, ``},
		{`"annotation":null`, `null null ["a","b"]`}, {`"annotation":" \n"`, ``},
		{`"tags":null`, `null null null`}, {`"tags":[]`, ``}, {`"value":-3,"annotation":"x","tags":["ü"]`, `-3 "x" ["ü"]`},
		{`"annotation":"","value":0,"tags":[]`, `0 null null`},
	} {
		answer := s.must(t, 200, "PUT", "/values", second, update(c.members))
		var n int
		if n = strings.Count(answer, `"value_id"`); c.want != "" {
			version++
		}
		if (n == 1) != (c.want != "") || !strings.Contains(answer, fmt.Sprintf(`"version":%d`, version)) ||
			!strings.Contains(answer, tenantA) ||
			(c.want == "") == strings.Contains(answer, `"skipped_no_ops":[]`) {
			t.Errorf("%s: answer %s, want version %d", c.members, answer, version)
		}
		got := mustDecode[readAnswer](t, s.must(t, 200, "GET", "/values?detail=true", key, "")).Data[0]
		text, _ := json.Marshal([]any{got.Value, got.Annotation, got.Tags})
		if want := "[" + strings.ReplaceAll(c.want, " ", ",") + "]"; c.want != "" &&
			strings.ReplaceAll(string(text), " ", ",") != want || *got.ChangedBy != "b@example.com" || got.Version != version {
			t.Errorf("%s leads to %s version %d by %s, want %s version %d", c.members, text, got.Version, *got.ChangedBy, c.want, version)
		}
	}
	all := mustDecode[readAnswer](t, s.must(t, 200, "GET", "/values?all_versions=true", key, ""))
	if all.Count != version || *all.Data[0].ChangedBy != "a@example.com" || *all.Data[0].Value != 1 {
		t.Errorf("the history has %d versions, want %d, and begins with %+v", all.Count, version, all.Data[0])
	}
	if got := mustQuery(t, s.db, `SELECT concat_ws(' ', count(*), min(value), min(version)) FROM current_values`); got != fmt.Sprint("1 0 ", version) {
		t.Errorf("the view current_values shows %q", got)
	}
}

func TestCorrectionFindsTheValueThatItNames(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, series := mustPicture(t, s)
	runs := strings.Fields(mustQuery(t, s.db, `SELECT string_agg(run_id::text, ' ' ORDER BY inserted_at) FROM runs_table`))
	const one, end = `{"valid_time":"2025-01-01T01:00:00Z",`, `"valid_time":"2025-01-01T00:00:00Z","valid_time_end":"2025-01-01T02:00:00Z",`
	s.mustAll(t, key, []httpCase{
		{"PUT", "/values", `{"updates":[` + one + `"series_key":"load","value":7}]}`, 200, []string{runs[1], `"version":2`}},
		{"PUT", "/values", `{"updates":[` + one + `"series_key":"load","value":8,"run_id":"` + strings.ToUpper(runs[0]) + `"}]}`, 200, []string{runs[0], `"version":2`}},
		{"PUT", "/values", `{"updates":[` + one + `"series_id":"` + series["load"] + `","value":9,"known_time":"2024-12-31 01:00+01:00"}]}`, 200, []string{runs[0], `"version":3`}},
		{"PUT", "/values", `{"updates":[{` + end + `"series_key":"price","value":21}]}`, 200, []string{`"version":2`}},
		{"PUT", "/values", `{"updates":[` + one + `"series_key":"wind","run_id":"` + runs[0] + `","value":6,"annotation":"late"}]}`, 200, []string{`"version":1`}}, // the run gains it
		{"PUT", "/values", `{"updates":[` + one + `"series_key":"wind","run_id":"` + runs[1] + `","value":null}]}`, 200, []string{`"version":1`}},
		{"PUT", "/values", `{"updates":[` + one + `"series_key":"load","value":1},` + one + `"series_key":"load","value":2}]}`, 200, []string{`"version":3`}}, // the last counts
		{"PUT", "/values", `{"updates":[]}`, 200, []string{`"updated":[]`, `"skipped_no_ops":[]`}},
	})
	const want = "00/load 00=1 v1, 00/load 01=9 v3, 00/load 02=null v1, 12/load 01=2 v3, 12/load 02=3.75 v2, 12/load 03=4.5 v1, 12/load 03=9 v1, " +
		"12/price 00-01=10 v1, 12/price 00-02=21 v2, 00/wind 00=0.5 v1, 00/wind 01=6 v1, 12/wind 01=null v1"
	if got := brief(t, s.must(t, 200, "GET", "/values?mode=overlapping&detail=true", key, "")); got != want {
		t.Errorf("after the corrections\nit is %s\nwant  %s", got, want)
	}
	before := s.stored(t)
	good := one + `"series_key":"load","value":55},`
	for _, c := range []struct {
		bad    string
		status int
		want   string
	}{
		{`{"valid_time":"2025-01-05","series_key":"load","value":1}`, 404, "updates[1]"}, {one + `"series_key":"nope","value":1}`, 404, "series_key"}, {one + `"series_id":"` + nobody + `","value":1}`, 404, "series_id"},
		{one + `"series_key":"load","valid_time_end":"2025-01-01T02:00:00Z","value":1}`, 404, "updates[1]"}, {`{"valid_time":"2025-01-01T00:00:00Z","series_key":"price","value":1}`, 404, "updates[1]"},
		{one + `"series_key":"load","run_id":"` + nobody + `","value":1}`, 404, "updates[1]"}, {one + `"series_key":"load","known_time":"2024-01-01","value":1}`, 404, "updates[1]"},
		{one + `"series_key":"load","run_id":"` + runs[0] + `","known_time":"2024-12-31T12:00:00Z","value":1}`, 404, "updates[1]"},
		{one + `"series_key":"price","run_id":"` + runs[0] + `","annotation":"x"}`, 422, "value"}, {one + `"series_key":"load"}`, 422, "updates[1]"}, {one + `"value":1}`, 422, "series"},
		{`{"series_key":"load","value":1}`, 422, "valid_time"}, {`{"valid_time":"soon","series_key":"load","value":1}`, 422, "valid_time"}, {one + `"series_key":"load","value":"1"}`, 422, "value"},
		{one + `"series_key":"load","value":1e999}`, 422, "value"}, {one + `"series_key":"load","value":NaN}`, 422, "updates[1]"}, {one + `"series_key":"load","value":1,"extra":1}`, 422, "extra"},
		{one + `"series_key":"load","tags":"x"}`, 422, "tags"}, {one + `"series_key":"load","tags":[5]}`, 422, "tags"}, {one + `"series_key":"load","tags":[null,"x"]}`, 422, "tags"},
		{one + `"series_key":"load","tags":["x"` + strings.Repeat(`,"x"`, maxTags) + `]}`, 422, "tags"}, {one + `"series_key":"load","tags":"x"}`, 422, "list of texts"}, {one + `"series_key":"load","tags":["a\u0000"]}`, 422, "tags"},
		{one + `"series_key":"load","annotation":5}`, 422, "annotation"}, {one + `"series_key":"load","annotation":"\u0000"}`, 422, "annotation"}, {one + `"series_key":"load","run_id":"x","value":1}`, 422, "run_id"},
		{one + `"series_key":"wind","series_id":"` + series["load"] + `","value":1}`, 422, "wind"}, {one + `"series_key":"load","valid_time_end":"2025-01-01","value":1}`, 422, "valid_time_end"},
		{one + `"series_key":"load","known_time":"x","value":1}`, 422, "known_time"}, {one + `"series_key":"load","tenant_id":"` + tenantB + `","value":1}`, 403, "tenant_id"}, {`5`, 422, "updates[1]"}, {`null`, 422, "updates[1]"},
	} {
		if text := s.must(t, c.status, "PUT", "/values", key, `{"updates":[`+good+c.bad+`]}`); !strings.Contains(text, c.want) {
			t.Errorf("%s: %s, want %s in it", c.bad, text, c.want)
		}
		if s.stored(t) != before {
			t.Fatalf("%s: refused, and yet something was stored", c.bad)
		}
	}
	s.mustAll(t, key, []httpCase{
		{"PUT", "/values", `{`, 422, []string{"body"}}, {"PUT", "/values", `[]`, 422, []string{"body"}}, {"PUT", "/values", `{"updates":{}}`, 422, []string{"updates"}}, {"PUT", "/values", `{"updates":[],"x":1}`, 422, []string{"x"}},
		{"PUT", "/values", `{"updates":[],"updates":[]}`, 422, []string{"updates"}}, {"PUT", "/values", `{"Updates":[]}`, 422, []string{"Updates"}}, {"PUT", "/values?x=1", `{"updates":[]}`, 422, []string{"x"}},
	})
	s.must(t, 415, "PUT", "/values", key, "a,b", "Content-Type: text/csv")
}

func TestManyCorrectionsAreOneRequest(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	const n = 3000
	mustManyValues(t, s, key, n)
	var updates []string
	for i := range n {
		at := time.Date(2020, 1, 1, 0, i, 0, 0, time.UTC).Format(time.RFC3339)
		updates = append(updates, fmt.Sprintf(`{"series_key":"load","valid_time":%q,"value":%d.5}`, at, i))
	}
	text := s.must(t, 200, "PUT", "/values", key, `{"updates":[`+strings.Join(updates, ",")+`]}`)
	got := mustDecode[struct {
		Updated []struct {
			ID      int64     `json:"value_id"`
			Time    time.Time `json:"valid_time"`
			Version int
		}
	}](t, text)
	ids := map[int64]bool{}
	for i, u := range got.Updated {
		if ids[u.ID] = true; u.Version != 2 || !u.Time.Equal(time.Date(2020, 1, 1, 0, i, 0, 0, time.UTC)) {
			t.Fatalf("updated[%d] is %+v", i, u)
		}
		if stored := i % 500; stored == 0 && mustQuery(t, s.db, `SELECT valid_from = $2 FROM values_table WHERE value_id = $1`,
			u.ID, u.Time) != "true" {
			t.Errorf("value_id of updated[%d] is another row's", i)
		}
	}
	if len(ids) != n {
		t.Errorf("%d value_ids, want %d", len(ids), n)
	}
	for i, row := range mustDecode[readAnswer](t, s.must(t, 200, "GET", "/values", key, "")).Data {
		if *row.Value != float64(i)+0.5 {
			t.Fatalf("after the corrections row %d is %v", i, *row.Value)
		}
	}
}

func TestConcurrentCorrectionsOfOneValueAreAllKept(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	s.must(t, 200, "POST", "/upload", key, oneValue)
	together(8, func(i int) {
		resp, text, err := s.do("PUT", "/values", key, update(fmt.Sprintf(`"value":%d`, 100+i)))
		if err != nil || resp.StatusCode != 200 || !strings.Contains(text, "value_id") {
			t.Errorf("%v %v %s", resp, err, text)
		}
	})
	if got := mustQuery(t, s.db, `SELECT string_agg(version::text, ' ' ORDER BY version) FROM values_table`); got != "1 2 3 4 5 6 7 8 9" {
		t.Errorf("the versions are %s", got)
	}
	together(2, func(i int) { s.do("PUT", "/values", key, update(`"tags":["t`+strconv.Itoa(i)+`"]`)) })
	if got := mustQuery(t, s.db, `SELECT string_agg(version::text, ' ' ORDER BY version) FROM values_table WHERE tags IS NOT NULL`); got != "10 11" {
		t.Errorf("two at once made the versions %s", got)
	}
}

// mustNorth uploads what the queries of docs/SQL.md ask for, as the page's tenant and with other values as tenant B, and runs the
// page's SQL for that tenant's role. It returns the page's queries as they then run, with Grafana's macros written out as the page
// says; and the database as that role.
func mustNorth(t *testing.T) (s *testServer, key string, queries []string, reader *sql.DB) {
	t.Helper()
	s = mustServer(t)
	key = s.mustUser(t, "7d1f0c52-3b8e-4f5a-9c46-2a6be01d9f37", "north@example.com")
	other := s.mustUser(t, tenantB, "b@example.com")
	day := func(value int, name string, step time.Duration) (csv string) { // from an hour before the day to an hour after it
		for at := -time.Hour; at <= 24*time.Hour; at += step {
			csv += fmt.Sprintf("%s,%s,%d\n", time.Date(2025, 1, 2, 0, 0, 0, 0, time.UTC).Add(at).Format(time.RFC3339), name, value+int(at/step))
		}
		return csv
	}
	now := time.Now().UTC().Truncate(time.Hour) // in the middle of a row of values_table
	later := fmt.Sprintf("%s,wind_measured,-7\n%s,wind_measured,-8\n", now.Format(time.RFC3339), now.Add(5*time.Hour).Format(time.RFC3339))
	for _, run := range []struct{ key, known, csv string }{
		{key, "2025-01-01T12:00Z", day(100, "wind_forecast", time.Hour)}, {key, "2025-01-02T06:00Z", day(200, "wind_forecast", time.Hour)},
		{key, "2025-01-03", day(90, "wind_measured", 20*time.Minute) + later},
		{other, "2025-01-01T13:00Z", day(700, "wind_forecast", time.Hour)}, {other, "2025-01-03", day(700, "wind_measured", time.Minute)},
	} {
		s.must(t, 200, "POST", "/upload?run_start_time=2025-01-01&known_time="+run.known, run.key,
			"valid_time,value_key,value\n"+run.csv, "Content-Type: text/csv")
	}
	correct := func(series, hour, value string) string {
		return `{"series_key":"` + series + `","valid_time":"2025-01-02T` + hour + `Z","value":` + value + `}`
	}
	s.must(t, 200, "PUT", "/values", key, `{"updates":[`+strings.Join([]string{correct("wind_measured", "05:20", "null"),
		correct("wind_measured", "07:00", "null"), correct("wind_measured", "07:20", "null"), correct("wind_measured", "07:40", "null"),
		strings.Replace(correct("wind_forecast", "03:00", "50"), "{", `{"known_time":"2025-01-01T12:00Z",`, 1)}, ",")+`]}`)
	page, err := os.ReadFile("docs/SQL.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)\n```sql\n(.*?)```").FindAllStringSubmatch(string(page), -1)
	expanded := regexp.MustCompile("expand: `(.*)`, and `(.*)`").FindStringSubmatch(string(page))
	if len(blocks) != 5 || expanded == nil {
		t.Fatalf("docs/SQL.md has %d blocks of SQL and macros %q", len(blocks), expanded)
	}
	// A role belongs to the cluster, and this test's database has another name.
	role, password := fmt.Sprintf("timedb_test_north_%016x", rand.Uint64()), fmt.Sprintf("north-password-%x", rand.Uint64())
	database := strings.TrimPrefix(mustParse(t, s.dsn).Path, "/")
	names := strings.NewReplacer("north_reader", role, "DATABASE timedb", "DATABASE "+database)
	t.Cleanup(func() { mustExec(t, s.db, "DROP OWNED BY "+role+"; DROP ROLE "+role) })
	mustExec(t, s.db, "GRANT CREATE ON SCHEMA public TO PUBLIC") // as PostgreSQL 14 has it
	mustExec(t, s.db, names.Replace(blocks[3][1]))
	mustExec(t, s.db, "ALTER ROLE "+role+" PASSWORD '"+password+"'")
	macros := strings.NewReplacer("$__time(valid_time)", expanded[1], "$__timeFilter(valid_time)", expanded[2])
	for _, i := range []int{0, 1, 2, 4} {
		queries = append(queries, macros.Replace(blocks[i][1]))
	}
	return s, key, queries, mustOpen(t, databaseURL(database, url.UserPassword(role, password))+"&timezone=UTC")
}

func TestQueriesOfTheSQLDocumentAnswerAsTheAPIDoes(t *testing.T) {
	t.Parallel()
	s, key, queries, reader := mustNorth(t)
	const day = "/values?start_valid=2025-01-02&end_valid=2025-01-03&series_key="
	read := func(path string) []answerRow {
		return mustDecode[readAnswer](t, s.must(t, 200, "GET", path, key, "")).Data
	}
	type row = map[string]any
	want := make([][]row, len(queries))
	for _, r := range read(day + "wind_measured&bucket=PT1H&agg=mean") {
		want[0] = append(want[0], row{"hour": r.Valid, "mean": r.Value})
	}
	newest, measured := map[string]answerRow{}, map[time.Time]float64{}
	for _, r := range read("/values?end_valid=" + time.Now().UTC().Format(time.RFC3339)) {
		newest[r.Series] = r
	}
	for _, id := range slices.Sorted(maps.Keys(newest)) {
		r := newest[id]
		want[1] = append(want[1], row{"series_key": r.Key, "valid_time": r.Valid, "value": r.Value, "unit": r.Unit})
	}
	for _, r := range read(day + "wind_measured") {
		if want[3] = append(want[3], row{"time": r.Valid, "wind_measured": r.Value}); r.Value != nil {
			measured[r.Valid] = *r.Value
		}
	}
	for _, r := range read(day + "wind_forecast&end_known=2025-01-02") {
		if m, ok := measured[r.Valid]; ok {
			want[2] = append(want[2], row{"valid_time": r.Valid, "forecast": r.Value, "measured": m, "error": *r.Value - m})
		}
	}
	// What is known beforehand, so that the two are not wrong together.
	for i, known := range []string{`05:00:00Z","mean":106}`, `"value":-7}`, `{"error":-49,"forecast":50,"measured":99,`,
		`05:20:00Z","wind_measured":null}`} {
		wanted, _ := json.Marshal(want[i])
		if len(want[i]) != []int{23, 2, 23, 72}[i] || !strings.Contains(string(wanted), known) {
			t.Errorf("the API answers %d rows %s, want %s in it", len(want[i]), wanted, known)
		}
		query := "SELECT replace(json_agg(q)::text, '+00:00', 'Z') FROM (" + strings.TrimSuffix(queries[i], ";\n") + ") AS q"
		for name, db := range map[string]*sql.DB{"owner": mustOpen(t, s.dsn+"&timezone=UTC"), "role": reader} {
			if got, _ := json.Marshal(mustDecode[[]row](t, mustQuery(t, db, query))); string(got) != string(wanted) {
				t.Errorf("%s\nanswers the %s\n%s\nwant\n%s", queries[i], name, got, wanted)
			}
		}
	}
}

func TestSQLRoleOfATenantSeesItsTenantAndNothingElse(t *testing.T) {
	t.Parallel()
	s, _, _, reader := mustNorth(t)
	const north = "7d1f0c52-3b8e-4f5a-9c46-2a6be01d9f37"
	for _, view := range []string{"current_values", "values_table", "series_table"} {
		const digest = `SELECT concat(count(*), ' ', md5(string_agg(v::text, ',' ORDER BY v::text))) FROM `
		want := mustQuery(t, s.db, digest+"public."+view+" v WHERE tenant_id = $1", north)
		if got := mustQuery(t, reader, digest+view+" v"); got != want || strings.HasPrefix(got, "0") {
			t.Errorf("%s shows the role %s, want %s", view, got, want)
		}
	}
	// A function that tells what it is given, and that the planner would like to call first, is given no other tenant's rows.
	mustExec(t, s.db, `CREATE FUNCTION tell(tenant uuid) RETURNS boolean IMMUTABLE COST 0.0001 LANGUAGE plpgsql AS $$ BEGIN
		IF tenant <> '`+north+`' THEN RAISE EXCEPTION 'told of %', tenant; END IF; RETURN true; END $$`)
	for _, view := range []string{"current_values", "values_table", "series_table"} {
		mustExec(t, reader, `SET enable_indexscan = off; SET enable_bitmapscan = off; SELECT FROM `+view+` WHERE public.tell(tenant_id)`)
	}
	for _, refused := range []string{
		`SELECT FROM public.current_values`, `SELECT FROM public.values_table`, `SELECT FROM public.series_table`, `SELECT FROM public.runs_table`,
		`SELECT FROM public.users_table`, `INSERT INTO public.runs_table (tenant_id) VALUES (NULL)`,
		`UPDATE public.users_table SET is_active = true`,
		`INSERT INTO series_table (series_key) VALUES ('x')`, `UPDATE values_table SET annotation = 'x'`, `DELETE FROM series_table`,
		`SET search_path = public; SELECT correct_values('` + north + `', 'x', '[]')`, `TRUNCATE public.values_table`,
		`DROP VIEW north.current_values`,
		`CREATE TABLE public.x ()`, `CREATE TABLE north.x ()`, `CREATE TEMPORARY TABLE x ()`, `CREATE SCHEMA x`, `CREATE VIEW north.x AS SELECT`,
		`CREATE FUNCTION pg_temp.x() RETURNS int RETURN 1`, `CREATE FUNCTION public.x() RETURNS int RETURN 1`, `CREATE ROLE x`,
		`COPY (SELECT) TO PROGRAM 'true'`, `SELECT pg_read_file('PG_VERSION')`,
		`SET ROLE ` + pq.QuoteIdentifier(mustQuery(t, s.db, `SELECT current_user`)),
	} {
		_, err := reader.Exec(refused)
		if failed, ok := errors.AsType[*pq.Error](err); !ok || failed.Code != "42501" {
			t.Errorf("%s: %v, want it to be denied", refused, err)
		}
	}
	if got := mustQuery(t, reader, `SELECT concat_ws(' ', current_setting('statement_timeout'), current_setting('search_path'), rolconnlimit)
		FROM pg_roles WHERE rolname = user`); got != "30s north 5" {
		t.Errorf("the role's limits are %q", got)
	}
	mustCreateTables(t, s.dsn) // as an upgrade does; and what depends on the tables keeps them
	if _, stderr := mustRun(t, 1, s.dsn, "", "delete", "tables", "-y"); !strings.Contains(stderr, "depend") {
		t.Errorf("delete tables beside the tenant's schema says %q", stderr)
	}
	mustExec(t, s.db, "DROP SCHEMA north CASCADE")
	mustRun(t, 0, s.dsn, "", "delete", "tables", "-y")
}

func FuzzParseTime(f *testing.F) {
	for _, seed := range []string{"2025-01-01T00:00:00Z", "2025-01-01", "2025-01-01 05:30 05:30",
		"1677-01-01T00:00:00.000001-23:59", "2262-12-31T23:59:59.999999999Z", "2025-02-29T00:00:00Z", "2025-01-01T24:00:00Z"} {
		f.Add(seed)
	}
	strict := regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$`) // time.Parse takes more than RFC 3339
	f.Fuzz(func(t *testing.T, s string) {
		var got, again micros
		err := got.UnmarshalText([]byte(s))
		want, wantErr := time.Parse(time.RFC3339Nano, s)
		if year := want.UTC().Year(); strict.MatchString(s) && (err == nil) != (wantErr == nil && year >= 1677 && year <= 2262) {
			t.Fatalf("parseTime(%q): %v, time.Parse: %v", s, err, wantErr)
		}
		if err != nil {
			return
		}
		text := got.String()
		if strict.MatchString(s) && text != iso6(want) {
			t.Errorf("parseTime(%q) is %s, want %s", s, text, iso6(want))
		}
		if err := again.UnmarshalText([]byte(text)); err != nil || again != got {
			t.Errorf("parseTime(%q) is written as %s, which reads as %v, %v", s, text, again, err)
		}
	})
}

// iso6 is t as the API writes it.
func iso6(t time.Time) string {
	if t = t.UTC().Truncate(time.Microsecond); t.Nanosecond() == 0 {
		return t.Format("2006-01-02T15:04:05-07:00")
	}
	return t.Format("2006-01-02T15:04:05.000000-07:00")
}

func FuzzSpan(f *testing.F) {
	for _, seed := range []string{"PT36H", "P1D", "P1W2DT3H4M5.5S", "90m", "1h30m", "P", "PT", "P1M", "-1h", "0s", "P99999W",
		"PT9999999999999999H", "1ns", "PT2562047H47M16.854775807SP100000D"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var got span
		err := got.UnmarshalText([]byte(s))
		if err == nil && (got < 0 || micros(got) < 0) {
			t.Errorf("%q is read as %d", s, got)
		}
		if d, goErr := time.ParseDuration(s); goErr == nil && err == nil && int64(micros(got)) != d.Microseconds() {
			t.Errorf("%q is read as %d µs, want %v", s, micros(got), d)
		}
	})
}

func FuzzNumber(f *testing.F) {
	for _, seed := range []string{"1", "-0", "1e308", "1e309", "NaN", "", "Infinity", "0x1p-2", "1_0", "5e-324", "+1", "nan", "null"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var got number
		if got.UnmarshalText([]byte(s)) != nil {
			return
		}
		want, wantErr := strconv.ParseFloat(s, 64)
		if math.IsInf(float64(got), 0) || !math.IsNaN(float64(got)) && (wantErr != nil || float64(got) != want) {
			t.Errorf("%q is read as %v, want %v %v", s, got, want, wantErr)
		}
	})
}

func FuzzDecodeArray(f *testing.F) {
	const oid, null = 701, uint64(0x7ff8000000000001)
	f.Add(encodeArray(oid, []uint64{1, null, math.MaxUint64}, null))
	f.Add(encodeArray(oid, nil, null))
	f.Add([]byte{0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 189, 255, 255, 255, 255, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, wire []byte) {
		_, _ = decodeArray(nil, wire, null) // it must not panic, whatever the database sends
		bits := make([]uint64, len(wire)/8)
		for i := range bits {
			bits[i] = binary.BigEndian.Uint64(wire[8*i:])
		}
		if len(bits) == 0 {
			return // no row holds an empty array
		}
		got, err := decodeArray([]uint64{42}, encodeArray(oid, bits, null), null)
		if err != nil || !slices.Equal(got, append([]uint64{42}, bits...)) {
			t.Errorf("%x comes back as %x, %v", bits, got, err)
		}
	})
}
