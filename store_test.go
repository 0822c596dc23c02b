package main

// These tests cover what is stored and what is shown of it: runs and series that uploads create, reads with their
// parameters, corrections, and the SQL of docs/SQL.md. Random histories of one tenant are compared with a naive model.
// The fuzz tests at the end read outside bytes with the parsers of store.go, without a database.

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lib/pq"
)

// seriesRow is a row of an upload, like at, but of any series.
func seriesRow(series, validTime, value string, more ...string) string {
	return strings.Replace(at(validTime, value, more...), `"value_key":"load"`, `"value_key":"`+series+`"`, 1)
}

// expectOK sends one request, which must be answered with 200, and returns the body. Unlike must it does not end the
// test, so that goroutines may call it.
func (s *testServer) expectOK(t *testing.T, method, path, key, body string) string {
	t.Helper()
	resp, text, err := s.do(method, path, key, body)
	if err != nil {
		t.Errorf("%s %s: %v", method, path, err)
	} else if resp.StatusCode != 200 {
		t.Errorf("%s %s: status %d, want 200: %s", method, path, resp.StatusCode, text)
	}
	return text
}

// mustRead reads values and returns the rows.
func (s *testServer) mustRead(t *testing.T, path, key string) []answerRow {
	t.Helper()
	return mustDecode[readAnswer](t, s.must(t, 200, "GET", path, key, "")).Data
}

// jsonText is v as JSON.
func jsonText(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // v is made of what JSON can hold
	}
	return string(text)
}

// ---- Timestamps

func TestTimestampsAreReadInEveryDocumentedForm(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	for i, c := range []struct{ name, in, want string }{
		{"a date", "2025-01-01", "2025-01-01T00:00:00+00:00"},
		{"minutes", "2025-01-01T05:30", "2025-01-01T05:30:00+00:00"},
		{"minutes and Z", "2024-02-29T12:00Z", "2024-02-29T12:00:00+00:00"},
		{"seconds after a space", "2025-01-01 05:30:01", "2025-01-01T05:30:01+00:00"},
		{"a tenth of a second", "2025-01-01T05:30:01.5", "2025-01-01T05:30:01.500000+00:00"},
		{"nanoseconds", "2025-01-01T05:30:01.123456789Z", "2025-01-01T05:30:01.123456+00:00"},
		{"an offset", "2025-01-01T05:30:00+05:30", "2025-01-01T00:00:00+00:00"},
		{"an offset whose plus became a space", "2025-01-01T05:30:00 05:30", "2025-01-01T00:00:00+00:00"},
		{"an offset of hours alone", "2025-01-01 05:30-01", "2025-01-01T06:30:00+00:00"},
		{"an offset without a colon", "2025-01-01T05:30:00+0100", "2025-01-01T04:30:00+00:00"},
		{"the first offset", "2025-01-01T05:30:00-12:00", "2025-01-01T17:30:00+00:00"},
		{"the last offset", "2025-01-01T14:00+14", "2025-01-01T00:00:00+00:00"},
		{"an offset of minus zero", "2024-12-31T23:59:59.999999-00:00", "2024-12-31T23:59:59.999999+00:00"},
		{"the first year", "1677-01-01T00:00:00Z", "1677-01-01T00:00:00+00:00"},
		{"the last year", "2262-12-31T23:59:59.999999Z", "2262-12-31T23:59:59.999999+00:00"},
		{"a microsecond before 1970", "1969-12-31T23:59:59.000001Z", "1969-12-31T23:59:59.000001+00:00"},
		{"a fraction before 2000", "1999-12-31T23:59:59.75Z", "1999-12-31T23:59:59.750000+00:00"},
	} {
		t.Run(c.name, func(t *testing.T) {
			series := fmt.Sprintf("s%d", i)
			s.must(t, 200, "POST", "/upload", key, runWith("", seriesRow(series, c.in, "1")))
			start := strings.ReplaceAll(c.in, " ", "%20") // a plus is left bare, as people write it
			text := s.must(t, 200, "GET", "/values?series_key="+series+"&start_valid="+start, key, "")
			if !strings.Contains(text, `"valid_time":"`+c.want+`"`) {
				t.Errorf("%s comes back in %s, want %s", c.in, text, c.want)
			}
		})
	}
}

// ---- Runs and series

func TestRepeatedUploadAnswersTheSameAndStoresNothing(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
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
	otherValue := strings.Replace(body, `"value":2`, `"value":3`, 1)
	otherMember := strings.Replace(body, `"run_id"`, `"workflow_id":"x","run_id"`, 1)
	otherSeries := strings.Replace(body, `"value_key":"load","value":2`, `"value_key":"new","value":2`, 1)
	s.runRequests(t, key, []requestCase{
		{"the same run with another value", "POST", "/upload", otherValue, 409, nil},
		{"the same run with a workflow_id", "POST", "/upload", otherMember, 409, nil},
		{"the same run with another series", "POST", "/upload", otherSeries, 409, nil},
	})
	if s.stored(t) != before {
		t.Error("a repeated upload stored something")
	}

	const path = "/upload?run_start_time=2025-01-01&run_id=" + tenantB
	uploadCSV := func(want int, path, value string) string {
		t.Helper()
		return s.must(t, want, "POST", path, key, "valid_time,value_key,value\n2025-01-01,load,"+value+"\n",
			"Content-Type: text/csv")
	}
	first = uploadCSV(200, path, "5")
	if again := uploadCSV(200, path, "5"); again != first {
		t.Errorf("the same CSV again answers %s, first %s", again, first)
	}
	uploadCSV(409, path, "6")
	uploadCSV(409, path+"&workflow_id=x", "6")
}

func TestConcurrentUploadsMakeOneRunAndOneSeries(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	row := func(series string) string { return seriesRow(series, "2025-01-01", "1") }

	// The same run: one request stores it, all get the same answer.
	var answers [8]string
	together(8, func(i int) {
		answers[i] = s.expectOK(t, "POST", "/upload", key, runWith(`"run_id":"`+nobody+`",`, row("x"), row("y")))
	})
	for _, answer := range answers {
		if answer != answers[0] || mustDecode[uploadAnswer](t, answer).RunID != nobody {
			t.Errorf("one of eight equal uploads answers %q, another %q", answer, answers[0])
		}
	}
	// Different runs that create the same series, in different orders.
	together(8, func(i int) {
		rows := []string{row("p"), row("q"), row("r")}
		rows[0], rows[i%3] = rows[i%3], rows[0]
		s.expectOK(t, "POST", "/upload", key, runWith("", rows...))
	})
	together(8, func(int) {
		s.expectOK(t, "POST", "/series", key, `{"name":"s","unit":"MW"}`)
	})
	if got := s.stored(t); got != "9 6 26 26" {
		t.Errorf("stored %q runs, series, blocks, values, want 9 6 26 26", got)
	}
}

func TestSeriesAreCreatedOncePerNameAndUnit(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	type answer struct {
		ID      string `json:"series_id"`
		Message string `json:"message"`
	}
	create := func(body string) answer {
		t.Helper()
		return mustDecode[answer](t, s.must(t, 200, "POST", "/series", key, body))
	}
	first := create(`{"name":"load","unit":"MW","description":"Load <&> ü"}`)
	again := create(`{"name":"load","unit":"MW"}`)
	if first.Message != "Series created successfully" || again.Message != "Series already exists" ||
		first.ID != again.ID {
		t.Errorf("POST /series answers %+v, then %+v", first, again)
	}
	listed := []string{`"series_key":"empty"`, `"unit":"dimensionless"`, `"series_key":"load"`}
	s.runRequests(t, key, []requestCase{
		{"an existing name without its unit", "POST", "/series", `{"name":"load"}`, 409, []string{"unit"}},
		{"an existing name with another unit", "POST", "/series", `{"name":"load","unit":"kW"}`, 409, []string{"unit"}},
		{"an existing name with another description", "POST", "/series",
			`{"name":"load","unit":"MW","description":"x"}`, 409, []string{"description", "Load"}},
		{"an existing name with an empty description", "POST", "/series",
			`{"name":"load","unit":"MW","description":" "}`, 409, []string{"description"}},
		{"an existing name with its description", "POST", "/series",
			`{"name":"load","unit":"MW","description":" Load <&> ü "}`, 200, []string{"already exists", first.ID}},
		{"an existing name with a description of null", "POST", "/series",
			`{"name":"load","unit":"MW","description":null}`, 200, []string{"already exists", first.ID}},
		{"a blank name", "POST", "/series", `{"name":" "}`, 422, []string{"name"}},
		{"no name", "POST", "/series", `{}`, 422, []string{"name"}},
		{"an empty unit", "POST", "/series", `{"name":"x","unit":""}`, 422, []string{"unit"}},
		{"a name with a zero width joiner", "POST", "/series", `{"name":"lo\u200dad"}`, 422, []string{"name", "format characters"}},
		{"a unit with a mark of direction", "POST", "/series", `{"name":"x","unit":"M\u200eW"}`, 422, []string{"unit"}},
		{"a name and a unit with white space", "POST", "/series", `{"name":" load\n","unit":"\u00a0MW\t"}`, 200, []string{first.ID}},
		{"a number as name", "POST", "/series", `{"name":5}`, 422, []string{"name"}},
		{"an unknown member", "POST", "/series", `{"name":"x","extra":1}`, 422, []string{"extra"}},
		{"a member twice", "POST", "/series", `{"name":"x","name":"y"}`, 422, []string{"name"}},
		{"a NUL in the name", "POST", "/series", `{"name":"x\u0000"}`, 422, []string{"name"}},
		{"an unknown parameter", "POST", "/series?x=1", `{"name":"x"}`, 422, []string{"x"}},
		{"a form as body", "POST", "/series", `name=x`, 422, []string{"body"}},
		{"a name alone", "POST", "/series", `{"name":"empty"}`, 200, []string{"Series created successfully"}},
		{"an empty description where there is none", "POST", "/series", `{"name":"empty","description":""}`, 200,
			[]string{"already exists"}},
		{"a description where there is none", "POST", "/series", `{"name":"empty","description":"x"}`, 409,
			[]string{"description"}},
		{"the list of series", "GET", "/list_timeseries", "", 200, listed},
		{"the list with an unknown parameter", "GET", "/list_timeseries?x=1", "", 422, []string{"x"}},
		{"a series without values", "GET", "/values?series_key=empty", "", 200, []string{`"count":0`, `"data":[]`}},
	})
	// An upload finds a series by its key whatever its unit, or by its id, or by both.
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

// Keys were once stored with the white space around them. They are found by just that, and no other is.
func TestKeysStoredWithWhiteSpaceAreStillFound(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	storeAsBefore := func(t *testing.T, name string) (id string) {
		t.Helper()
		return mustQuery(t, s.db, `INSERT INTO series_table (tenant_id, series_key, unit)
			VALUES ($1, $2, 'MW') RETURNING series_id`, tenantA, name)
	}
	pad, both := storeAsBefore(t, " pad "), storeAsBefore(t, "both ")
	bare := s.mustUpload(t, key, runWith("", seriesRow("both", "2025-01-01", "1"))).SeriesIDs["both"]
	if bare == both || bare == "" {
		t.Fatalf("a new key is the old one with a space: %s", bare)
	}
	for _, c := range []struct{ name, key, want string }{ // want: the series; "" if there is none
		{"as it is stored", " pad ", pad},
		{"without the white space", "pad", ""},
		{"with other white space", "  pad ", ""},
		{"of two as the old one is stored", "both ", both},
		{"of two the new one", "both", bare},
		{"of two the new one, with other white space", " both", bare},
	} {
		t.Run(c.name, func(t *testing.T) {
			upload := runWith(`"create_series":false,`, seriesRow(c.key, "2025-01-02", "1"))
			correct := corrections(`{"valid_time":"2025-01-02","series_key":"` + c.key + `","value":2}`)
			if c.want == "" {
				s.must(t, 404, "POST", "/upload", key, upload)
				s.must(t, 404, "GET", "/values?series_key="+url.QueryEscape(c.key), key, "")
				s.must(t, 404, "PUT", "/values", key, correct)
				return
			}
			if got := s.mustUpload(t, key, upload).SeriesIDs; len(got) != 1 || slices.Collect(maps.Values(got))[0] != c.want {
				t.Errorf("an upload finds %v, want %s", got, c.want)
			}
			for _, row := range s.mustRead(t, "/values?series_key="+url.QueryEscape(c.key), key) {
				if row.Series != c.want {
					t.Errorf("a read shows %s, want %s", row.line(), c.want)
				}
			}
			expectIn(t, "a correction", s.must(t, 200, "PUT", "/values", key, correct), c.want)
		})
	}
	t.Run("an upload makes no second one", func(t *testing.T) {
		body := runWith("", seriesRow(" pad ", "2025-01-03", "1"), `{"valid_time":"2025-01-04","value_key":" pad ","series_id":"`+pad+`","value":1}`)
		if got := s.mustUpload(t, key, body).SeriesIDs; got[" pad "] != pad || len(got) != 1 {
			t.Errorf("it finds %v, want %s", got, pad)
		}
	})
	t.Run("but of the key without it", func(t *testing.T) {
		body := runWith(`"series_descriptions":{"pad ":"new"},`, seriesRow("pad", "2025-01-03", "1"), seriesRow("  pad", "2025-01-04", "1"))
		if got := s.mustUpload(t, key, body).SeriesIDs; got["pad"] == pad || len(got) != 1 {
			t.Errorf("it finds %v, want one that is new", got)
		}
		expectIn(t, "the list", s.must(t, 200, "GET", "/list_timeseries", key, ""), `"description":"new"`)
	})
}

// ---- Reads

// longSeries has more values than a row of values_table holds (1000), more days than a row spans (32), gaps around 32
// days, a thousand microseconds on end, and numbers that are hard to write.
func longSeries() (times []time.Time, values []float64) {
	begin := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	for i := range 2500 {
		times = append(times, begin.Add(time.Duration(i)*time.Hour))
	}
	const most = 32 * 24 * time.Hour
	for _, gap := range []time.Duration{0, most - time.Microsecond, most, most + time.Microsecond} {
		times = append(times, begin.AddDate(3, 0, 0).Add(gap))
	}
	for i := range 1001 {
		times = append(times, begin.AddDate(10, 0, 0).Add(time.Duration(i)*time.Microsecond))
	}
	values = []float64{0.1, 1e-7, 1e300, 5e-324, math.MaxFloat64, -math.MaxFloat64, 1 / 3.0, 0, 1e15, 1e16,
		123456789.123456789, 1e21, 0.0001, 0.00001, 9007199254740993}
	for i := len(values); i < len(times); i++ {
		values = append(values, math.Ldexp(float64(i*i*7919%1_000_003), -i%40))
	}
	return times, values
}

// A row of one value has no arrays. It reads, and is corrected, as any other.
func TestSingleValueIsStoredWithoutArrays(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	for i, c := range []struct {
		name   string
		rows   []string
		arrays string // how many rows of values_table have some
		shown  string
		latest string
	}{
		{"a value", []string{at("2025-01-01T05:00Z", "1.5")}, "0", "load 05=1.5", "load 05=1.5"},
		{"-0.0", []string{at("2025-01-01T05:00Z", "-0.0")}, "0", "load 05=-0", "load 05=-0"},
		{"no value", []string{at("2025-01-01T05:00Z", "null")}, "0", "load 05=null", ""},
		{"an interval", []string{at("2025-01-01T05:00Z", "1", `,"valid_time_end":"2025-01-01T06:00Z"`)},
			"0", "load 05-06=1", "load 05-06=1"},
		{"two values", []string{at("2025-01-01T05:00Z", "1"), at("2025-01-01T06:00Z", "2")},
			"1", "load 05=1, load 06=2", "load 06=2"},
		{"two values far apart", []string{at("2025-01-01T05:00Z", "1"), at("2026-01-01T06:00Z", "2")},
			"0", "load 05=1, load 06=2", "load 06=2"},
		{"a value, and none far after it", []string{at("2025-01-01T05:00Z", "1"), at("2026-01-01T06:00Z", "null")},
			"0", "load 05=1, load 06=null", "load 05=1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tenant := fmt.Sprintf("aaaaaaaa-0000-4000-8000-%012d", i)
			key := s.mustUser(t, tenant, "a@example.com")
			s.must(t, 200, "POST", "/upload", key, runWith("", c.rows...))
			const withArrays = `SELECT count(*) FROM values_table WHERE tenant_id = $1
				AND (num_nonnulls(valid_to, valid_times, "values") > 0 OR version > 2)`
			if got := mustQuery(t, s.db, withArrays, tenant); got != c.arrays {
				t.Errorf("%s rows have arrays, want %s", got, c.arrays)
			}
			if got := brief(t, s.must(t, 200, "GET", "/values", key, "")); got != c.shown {
				t.Errorf("it reads %s, want %s", got, c.shown)
			}
			if got := brief(t, s.must(t, 200, "GET", "/values?latest=true", key, "")); got != c.latest {
				t.Errorf("the latest is %s, want %s", got, c.latest)
			}
			_, first, _ := strings.Cut(c.rows[0], `{`)
			first = strings.ReplaceAll(first, "value_key", "series_key")
			s.must(t, 200, "PUT", "/values", key, `{"updates":[{`+first+`]}`)
			s.must(t, 200, "PUT", "/values", key, `{"updates":[{"annotation":"read again",`+first+`]}`)
			if got := brief(t, s.must(t, 200, "GET", "/values", key, "")); got != c.shown {
				t.Errorf("corrected it reads %s, want %s", got, c.shown)
			}
			if got := mustQuery(t, s.db, withArrays, tenant); got != c.arrays {
				t.Errorf("corrected %s rows have arrays or a version that changes nothing, want %s", got, c.arrays)
			}
		})
	}
}

// Whoever writes into values_table by hand cannot store what no read understands.
func TestRowOfOneValueOrOfManyIsOneOrTheOther(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	s.must(t, 200, "POST", "/upload", key, oneValue)
	const insert = `INSERT INTO values_table (tenant_id, series_number, run_id, run_order, version, known_time, change_time,
			valid_from, value, valid_to, valid_times, "values", valid_time_ends)
		SELECT tenant_id, series_number, run_id, run_order, %d, known_time, now(), '2025-01-01Z', %s FROM values_table LIMIT 1`
	for i, c := range []struct {
		name, columns string // value, valid_to, valid_times, "values", valid_time_ends
		isRow         bool
	}{
		{"one value", `1, NULL, NULL, NULL, NULL`, true},
		{"one interval", `1, NULL, NULL, NULL, '{2025-01-02Z}'`, true},
		{"two values", `NULL, '2025-01-02Z', '{2025-01-01Z, 2025-01-02Z}', '{1, 2}', NULL`, true},
		{"both forms", `1, '2025-01-02Z', '{2025-01-01Z, 2025-01-02Z}', '{1, 2}', NULL`, false},
		{"values without times", `NULL, NULL, NULL, '{1, 2}', NULL`, false},
		{"times without values", `1, '2025-01-02Z', '{2025-01-01Z, 2025-01-02Z}', NULL, NULL`, false},
		{"an end of the row without times", `1, '2025-01-02Z', NULL, NULL, NULL`, false},
		{"two ends of one value", `1, NULL, NULL, NULL, '{2025-01-02Z, 2025-01-03Z}'`, false},
		{"one end of two values", `NULL, '2025-01-02Z', '{2025-01-01Z, 2025-01-02Z}', '{1, 2}', '{2025-01-02Z}'`, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := s.db.Exec(fmt.Sprintf(insert, 2+i, c.columns))
			if (err == nil) != c.isRow {
				t.Errorf("it is a row: %v (%v), want %v", err == nil, err, c.isRow)
			}
		})
	}
}

func TestLongSeriesComeBackExactly(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	times, values := longSeries()
	var rows []string
	for i, validTime := range times {
		value := strconv.FormatFloat(values[i], 'g', -1, 64)
		rows = append(rows, at(validTime.Format(time.RFC3339Nano), value))
	}
	rand.Shuffle(len(rows), func(i, j int) { rows[i], rows[j] = rows[j], rows[i] })
	s.must(t, 200, "POST", "/upload", key, runWith("", rows...))

	got := mustDecode[readAnswer](t, s.must(t, 200, "GET", "/values", key, ""))
	if got.Count != len(times) || len(got.Data) != len(times) {
		t.Fatalf("%d rows and a count of %d, want %d", len(got.Data), got.Count, len(times))
	}
	for i, row := range got.Data {
		if !row.Valid.Equal(times[i]) || row.Value == nil || *row.Value != values[i] {
			t.Fatalf("row %d is %s, want %v %v", i, row.line(), times[i], values[i])
		}
	}

	// Any window shows just what lies in it.
	for range 200 {
		i := rand.Intn(len(times))
		j := i + rand.Intn(min(1500, len(times)-i))
		start := url.QueryEscape(times[i].Format(time.RFC3339Nano))
		end := url.QueryEscape(times[j].Add(time.Microsecond).Format(time.RFC3339Nano))
		path := "/values?start_valid=" + start + "&end_valid=" + end
		part := mustDecode[readAnswer](t, s.must(t, 200, "GET", path, key, ""))
		if want := j - i + 1; part.Count != want || len(part.Data) != want {
			t.Fatalf("%s: %d rows and a count of %d, want %d", path, len(part.Data), part.Count, want)
		}
		if first, last := part.Data[0], part.Data[j-i]; !first.Valid.Equal(times[i]) || !last.Valid.Equal(times[j]) {
			t.Fatalf("%s: from %v to %v", path, first.Valid, last.Valid)
		}
	}
}

// mustPicture uploads what the tests below read, all on 2025-01-01: two runs of load known at different times, a third
// known when the second was, an interval series, and a correction of one value.
func mustPicture(t *testing.T, s *testServer) (key string, series map[string]string) {
	t.Helper()
	key = s.mustUser(t, tenantA, "a@example.com")
	row := func(name, hh, value string, more ...string) string {
		return seriesRow(name, "2025-01-01T"+hh+":00:00Z", value, more...)
	}
	until := func(hh string) string { return `,"valid_time_end":"2025-01-01T` + hh + `:00:00Z"` }
	const midnight, noon = "2024-12-31T00:00:00Z", "2024-12-31T12:00:00Z"
	series = map[string]string{}
	for _, run := range []struct {
		workflow, known string
		rows            []string
	}{
		{"first", midnight, []string{row("load", "00", "1"), row("load", "01", "2"), row("load", "02", "null"),
			row("wind", "00", "0.5")}},
		{"second", noon, []string{row("load", "03", "4.5"), row("load", "01", "2.5"), row("load", "02", "3.5"),
			row("price", "00", "20", until("02")), row("price", "00", "10", until("01"))}},
		{"third", noon, []string{row("load", "03", "9")}},
	} {
		body := runWith(`"workflow_id":"`+run.workflow+`","known_time":"`+run.known+`",`, run.rows...)
		answer := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", key, body))
		maps.Copy(series, answer.SeriesIDs)
	}
	s.must(t, 200, "PUT", "/values", key, corrections(
		correctionAt("02", `"series_key":"load","value":3.75,"annotation":"checked","tags":["a","b"]`)))
	return key, series
}

// brief is a read in short: each row as "known/series valid-end=value version". Times are hours; known, end and version
// are there if the answer has them.
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
		if r.Value != nil {
			row += "=" + strconv.FormatFloat(*r.Value, 'g', -1, 64)
		} else {
			row += "=null"
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
	runs := mustRuns(t, s)
	const (
		flat  = "load 00=1, load 01=2.5, load 02=3.75, load 03=9, price 00-01=10, price 00-02=20, wind 00=0.5"
		first = "load 00=1, load 01=2, load 02=null" // of load, as the first run has it
	)
	for _, c := range []struct{ name, query, want string }{
		{"all series", "", flat},
		{"the defaults by name", "mode=flat&all_versions=false", flat},
		{"overlapping runs of one series", "mode=overlapping&series_key=load",
			"00/load 00=1, 00/load 01=2, 00/load 02=null, " +
				"12/load 01=2.5, 12/load 02=3.75, 12/load 03=4.5, 12/load 03=9"},
		{"overlapping runs of a key and an id", "mode=overlapping&series_key=wind&series_id=" + series["price"],
			"12/price 00-01=10, 12/price 00-02=20, 00/wind 00=0.5"},
		{"an id twice, once in upper case",
			"series_id=" + series["wind"] + "&series_id=" + strings.ToUpper(series["wind"]), "wind 00=0.5"},
		{"a series by key and by id", "series_key=wind&series_id=" + series["wind"], "wind 00=0.5"},
		{"a window", "series_key=load&start_valid=2025-01-01T01:00:00Z&end_valid=2025-01-01T03:00:00Z",
			"load 01=2.5, load 02=3.75"},
		{"a window that begins within an interval", "start_valid=2025-01-01T00:00:01Z&series_key=price", ""},
		{"a window that ends before the first value", "end_valid=2025-01-01T00:00:00Z", ""},
		{"an empty window", "start_valid=2025-01-01T01:00:00Z&end_valid=2025-01-01T01:00:00Z", ""},
		{"an empty window of known_time",
			"mode=overlapping&start_known=2024-12-31T12:00:00Z&end_known=2024-12-31T12:00:00Z", ""},
		{"a window of all years", "start_valid=0001-01-01&end_valid=9999-12-31T23:59:59Z", flat},
		{"a window of known_time of all years", "start_known=0001-01-01&end_known=9999-12-31", flat},
		{"a window after all years", "start_valid=9999-12-31", ""},
		{"a window before all years", "end_valid=0001-01-01", ""},
		{"as of after all years", "as_of=9999-12-31T23:59:59.999999Z", flat},
		{"as of before all years", "as_of=0001-01-01", ""},
		{"changed since before all years", "changed_since=0000-01-01", flat},
		{"changed since after all years", "changed_since=9999-12-31", ""},
		{"known before", "end_known=2024-12-31T12:00:00Z&series_key=load", first},
		{"known from", "start_known=2024-12-31T12:00:00Z&series_key=load", "load 01=2.5, load 02=3.75, load 03=9"},
		{"known from after the last run", "start_known=2025-01-01", ""},
		{"all versions", "series_key=load&all_versions=true&start_valid=2025-01-01T02:00:00Z",
			"00/load 02=null v1, 12/load 02=3.5 v1, 12/load 02=3.75 v2, 12/load 03=4.5 v1, 12/load 03=9 v1"},
		{"a lead of a day", "series_key=load&lead=PT24H", first},
		{"a lead of just what the second run has", "series_key=load&lead=13h",
			"load 00=1, load 01=2.5, load 02=3.75, load 03=9"},
		{"a lead of a microsecond more", "series_key=load&lead=PT13H0.000001S",
			"load 00=1, load 01=2, load 02=3.75, load 03=9"},
		{"a lead of a day and an hour", "lead=P1DT1H&series_key=load", "load 01=2, load 02=null"},
		{"a lead that nothing has", "lead=P1W", ""},
		{"known by noon of the day before", "series_key=load&days_ahead=1&time_of_day=12:00",
			"load 00=1, load 01=2.5, load 02=3.75, load 03=9"},
		{"known by a second before", "series_key=load&days_ahead=1&time_of_day=11:59:59", first},
		{"known by noon in Berlin", "series_key=load&days_ahead=1&time_of_day=12:00&tz=Europe/Berlin", first},
		{"known by noon of two days before", "days_ahead=2&time_of_day=12:00", ""},
		{"known by seven of the same day, which is yesterday in New York",
			"series_key=load&days_ahead=0&time_of_day=06:59&tz=America/New_York", first},
		{"every run known by then", "mode=overlapping&series_key=load&days_ahead=1&time_of_day=11:00",
			"00/load 00=1, 00/load 01=2, 00/load 02=null"},
		{"every version known by then",
			"all_versions=true&series_key=load&days_ahead=1&time_of_day=12:00&start_valid=2025-01-01T03:00:00Z",
			"12/load 03=4.5 v1, 12/load 03=9 v1"},
		{"the sum of what was known by then", "bucket=P1D&agg=sum&series_key=load&days_ahead=1&time_of_day=00:00",
			"load 00=3"},
		{"a zone alone", "tz=Asia/Tokyo", flat},
		{"the first", "bucket=PT2H&agg=first&series_key=load", "load 00=1, load 02=3.75"},
		{"the last", "bucket=PT2H&agg=last&series_key=load", "load 00=2.5, load 02=9"},
		{"the last that is not NULL", "bucket=P1D&agg=last&series_key=load&end_known=2024-12-31T12:00:00Z", "load 00=2"},
		{"the mean", "bucket=PT2H&agg=mean&series_key=load", "load 00=1.75, load 02=6.375"},
		{"the minimum", "bucket=2h&agg=min&series_key=load", "load 00=1, load 02=3.75"},
		{"the maximum", "bucket=P1D&agg=max", "load 00=9, price 00=20, wind 00=0.5"},
		{"the sum", "bucket=P1D&agg=sum", "load 00=16.25, price 00=30, wind 00=0.5"},
		{"the count leaves out NULL", "bucket=P1D&agg=count&end_known=2024-12-31T12:00:00Z", "load 00=2, wind 00=1"},
		{"a bucket of NULL alone", "bucket=PT1H&agg=mean&series_key=load&end_known=2024-12-31T12:00:00Z",
			"load 00=1, load 01=2"},
		{"buckets begin at multiples since 1970", "bucket=90m&agg=max&series_key=load&start_valid=2025-01-01T01:00:00Z",
			"load 00=2.5, load 01=3.75, load 03=9"},
		{"a limit counts buckets", "bucket=PT1H&agg=count&series_key=load&limit=2", "load 00=1, load 01=1"},
		{"a limit counts rows", "limit=3", "load 00=1, load 01=2.5, load 02=3.75"},
		{"a limit beyond the rows", "limit=1000&series_key=wind", "wind 00=0.5"},
		{"as of a time before all series", "as_of=2020-01-01", ""},
		{"a match of the end", "match=*e", "price 00-01=10, price 00-02=20"},
		{"a match of one character", "match=win?", "wind 00=0.5"},
		{"a match of everything", "match=*", flat},
		{"a match is anchored", "match=oa&match=in?", ""},
		{"a match matters by case", "match=WIND&match=Wind", ""},
		{"a match knows neither % nor _", "match=%25&match=w_nd&match=w%25", ""},
		{"a match knows no escape", `match=win\?&match=\*`, ""},
		{"two matches of one series", "match=wind&match=w*", "wind 00=0.5"},
		{"a match, a key and an id", "match=w*&series_key=price&series_id=" + series["wind"],
			"price 00-01=10, price 00-02=20, wind 00=0.5"},
		{"a match of nothing beside a key", "match=x*&series_key=wind", "wind 00=0.5"},
		{"overlapping runs of a match", "match=w*d&mode=overlapping", "00/wind 00=0.5"},
		{"a match as of a time before all series", "match=*&as_of=2020-01-01", ""},
		{"the latest of all series", "latest=true", "load 03=9, price 00-02=20, wind 00=0.5"},
		{"the latest of a series by key", "latest=true&series_key=load", "load 03=9"},
		{"the latest of a match", "latest=true&match=*i*", "price 00-02=20, wind 00=0.5"},
		{"the latest of a match and a key", "latest=true&match=w*&series_key=load", "load 03=9, wind 00=0.5"},
		{"the latest in a window", "latest=true&end_valid=2025-01-01T03:00:00Z&series_key=load", "load 02=3.75"},
		{"the latest that is not NULL", "latest=true&series_key=load&end_known=2024-12-31T12:00:00Z", "load 01=2"},
		{"the latest with a lead", "latest=true&series_key=load&lead=PT16H", "load 01=2"},
		{"the latest that was known by a second before noon",
			"latest=true&series_key=load&days_ahead=1&time_of_day=11:59:59", "load 01=2"},
		{"the latest of a run", "latest=true&run_id=" + runs[1], "load 03=4.5, price 00-02=20"},
		{"a run", "run_id=" + runs[0], first + ", wind 00=0.5"},
		{"two runs, one in upper case", "series_key=load&run_id=" + strings.ToUpper(runs[0]) + "&run_id=" + runs[2],
			first + ", load 03=9"},
		{"a run and its correction", "mode=overlapping&series_key=load&all_versions=true&run_id=" + runs[1],
			"12/load 01=2.5 v1, 12/load 02=3.5 v1, 12/load 02=3.75 v2, 12/load 03=4.5 v1"},
		{"buckets of a run", "series_key=load&bucket=P1D&agg=sum&run_id=" + runs[0], "load 00=3"},
		{"a workflow", "workflow_id=second", "load 01=2.5, load 02=3.75, load 03=4.5, price 00-01=10, price 00-02=20"},
		{"two workflows", "workflow_id=first&workflow_id=third&series_key=load", first + ", load 03=9"},
		{"a workflow that there is not", "workflow_id=nope", ""},
		{"a workflow and a run of another", "workflow_id=first&run_id=" + runs[1], ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := brief(t, s.must(t, 200, "GET", "/values?"+c.query, key, "")); got != c.want {
				t.Errorf("GET /values?%s\nshows %s\nwant  %s", c.query, got, c.want)
			}
		})
	}
}

func TestReadsRefuseUnknownSeriesAndBadParameters(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, _ := mustPicture(t, s)
	s.must(t, 200, "POST", "/series", s.mustUser(t, tenantB, "b@example.com"), `{"name":"turbine"}`)
	run := mustRuns(t, s)[0]
	for _, c := range []struct{ name, query, detail string }{
		{"an unknown key", "series_key=nope", `series_key: there is no series "nope"`},
		{"a misspelt key", "series_key=laad", `series_key: there is no series "laad"; did you mean "load"?`},
		{"a misspelt key beside a known one", "series_key=wind&series_key=lod",
			`series_key: there is no series "lod"; did you mean "load"?`},
		{"a key like another tenant's", "series_key=turbin", `series_key: there is no series "turbin"`},
		{"an unknown id", "series_id=" + nobody, `series_id: there is no series "` + nobody + `"`},
		{"an unknown key beside a known one", "series_key=load&series_key=nope", `series_key: there is no series "nope"`},
		{"a series as of a time before it", "as_of=2020-01-01&series_key=load",
			`series_key: as of then there was no series "load"`},
		{"an unknown key beside a match", "match=*&series_key=nope", `series_key: there is no series "nope"`},
		{"an unknown id beside a match", "match=*&latest=true&series_id=" + nobody,
			`series_id: there is no series "` + nobody + `"`},
		{"an unknown run", "run_id=" + nobody, `run_id: there is no run "` + nobody + `"`},
		{"a run as of a time before it", "as_of=2020-01-01&run_id=" + run, `run_id: there is no run "` + run + `"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := mustDecode[map[string]string](t, s.must(t, 404, "GET", "/values?"+c.query, key, ""))["detail"]
			if got != c.detail {
				t.Errorf("the answer is %q, want %q", got, c.detail)
			}
		})
	}
	for _, c := range []struct{ name, query, want string }{
		{"an unknown parameter", "nope=1", "nope"},
		{"a parameter in upper case", "Mode=flat", "Mode"},
		{"a bad escape", "start_valid=%zz", "query"},
		{"an empty mode", "mode=", "mode"},
		{"an unknown mode", "mode=both", "mode"},
		{"the mode twice", "mode=flat&mode=flat", "mode"},
		{"an id that is no UUID", "series_id=x", "series_id"},
		{"an empty id", "series_id=", "series_id"},
		{"an empty key", "series_key=", "series_key"},
		{"a start_valid that is no time", "start_valid=x", "start_valid"},
		{"an empty end_valid", "end_valid=", "end_valid"},
		{"a start_known in month 13", "start_known=2025-13-01", "start_known"},
		{"an end_known that is no time", "end_known=x", "end_known"},
		{"an as_of that is no time", "as_of=x", "as_of"},
		{"a window that ends before it starts", "start_valid=2025-01-02&end_valid=2025-01-01", "valid"},
		{"a bound with an offset that there is not", "start_valid=2025-01-02T00:00:00%2B14:30", "start_valid"},
		{"a year of five digits", "end_valid=10000-01-01", "end_valid"},
		{"an empty match", "match=", "match"},
		{"a run_id that is no UUID", "run_id=x", "run_id"},
		{"an empty workflow_id", "workflow_id=", "workflow_id"},
		{"a changed_since that is no time", "changed_since=yesterday", "changed_since"},
		{"latest that is not true or false", "latest=1h", "latest"},
		{"latest of overlapping runs", "latest=true&mode=overlapping", "latest"},
		{"latest of all versions", "latest=true&all_versions=true", "latest"},
		{"latest of buckets", "latest=true&bucket=1h&agg=max", "latest"},
		{"a window of known_time that ends before it starts", "start_known=2025-01-02&end_known=2025-01-01", "known"},
		{"all_versions that is not true or false", "all_versions=perhaps", "all_versions"},
		{"detail that is not true or false", "detail=2", "detail"},
		{"a limit of zero", "limit=0", "limit"},
		{"a negative limit", "limit=-1", "limit"},
		{"a limit that is no number", "limit=x", "limit"},
		{"a limit with an exponent", "limit=1e3", "limit"},
		{"a lead that is no duration", "lead=x", "lead"},
		{"a lead of a month", "lead=P1M", "lead"},
		{"an empty lead", "lead=", "lead"},
		{"a negative lead", "lead=-1h", "lead"},
		{"a lead of P alone", "lead=P", "lead"},
		{"a lead of PT alone", "lead=PT", "lead"},
		{"a bucket without agg", "bucket=PT1H", "agg"},
		{"agg without a bucket", "agg=mean", "bucket"},
		{"an unknown agg", "bucket=PT1H&agg=median", "agg"},
		{"an empty agg", "bucket=PT1H&agg=", "agg"},
		{"an unknown agg beside another", "bucket=PT1H&agg=mean&agg=median", "agg"},
		{"an agg twice", "bucket=PT1H&agg=mean&agg=min&agg=mean", "agg: mean given twice"},
		{"a bucket of several units", "bucket=P1M2D&agg=mean", "one calendar unit"},
		{"a bucket of weeks and days", "bucket=P1W1D&agg=mean", "one calendar unit"},
		{"a bucket of a day and hours", "bucket=P1DT12H&agg=mean", "one calendar unit"},
		{"a bucket of P alone", "bucket=P&agg=mean", "bucket"},
		{"a bucket of PT alone", "bucket=PT&agg=mean", "bucket"},
		{"a bucket of no days", "bucket=P0D&agg=mean", "bucket"},
		{"a bucket of no days by another name", "bucket=0d&agg=mean", "bucket"},
		{"a bucket of half a month", "bucket=P0.5M&agg=mean", "bucket"},
		{"a bucket of a negative month", "bucket=P-1M&agg=mean", "bucket"},
		{"a bucket of a month without its P", "bucket=1M&agg=mean", "bucket"},
		{"a bucket of a thousand years", "bucket=P1000Y&agg=mean", "bucket"},
		{"a bucket twice", "bucket=P1D&bucket=P1D&agg=mean", "bucket"},
		{"an empty tz", "tz=", "tz"},
		{"the server's own zone", "tz=Local", "tz"},
		{"the server's own zone as a file", "tz=localtime", "tz"},
		{"a zone with leap seconds", "tz=right/Europe/Berlin", "tz"},
		{"a zone that there is not", "tz=Europe/Atlantis", "tz"},
		{"a zone in lower case", "tz=europe/berlin", "tz"},
		{"an offset as a zone", "tz=%2B01:00", "tz"},
		{"a path as a zone", "tz=Europe/../../../../etc/passwd", "tz"},
		{"a folder as a zone", "tz=Europe", "tz"},
		{"a zone twice", "tz=UTC&tz=UTC", "tz"},
		{"days_ahead without time_of_day", "days_ahead=1", "time_of_day"},
		{"time_of_day without days_ahead", "time_of_day=12:00", "days_ahead"},
		{"days_ahead with lead", "days_ahead=1&time_of_day=12:00&lead=PT0H", "lead"},
		{"negative days_ahead", "days_ahead=-1&time_of_day=12:00", "days_ahead"},
		{"half days_ahead", "days_ahead=0.5&time_of_day=12:00", "days_ahead"},
		{"more days_ahead than there are", "days_ahead=65536&time_of_day=12:00", "days_ahead"},
		{"empty days_ahead", "days_ahead=&time_of_day=12:00", "days_ahead"},
		{"an empty time_of_day", "days_ahead=1&time_of_day=", "time_of_day"},
		{"a time_of_day of one digit", "days_ahead=1&time_of_day=9:30", "time_of_day"},
		{"a time_of_day of 24 hours", "days_ahead=1&time_of_day=24:00", "time_of_day"},
		{"a time_of_day of 60 minutes", "days_ahead=1&time_of_day=12:60", "time_of_day"},
		{"a time_of_day of 60 seconds", "days_ahead=1&time_of_day=12:00:60", "time_of_day"},
		{"a time_of_day with a fraction", "days_ahead=1&time_of_day=12:00:00.5", "time_of_day"},
		{"a time_of_day with an offset", "days_ahead=1&time_of_day=12:00Z", "time_of_day"},
		{"a time_of_day with an offset of hours", "days_ahead=1&time_of_day=12:00%2B01", "time_of_day"},
		{"a time_of_day in words", "days_ahead=1&time_of_day=noon", "time_of_day"},
		{"a bucket of no width", "bucket=0s&agg=mean", "bucket"},
		{"a bucket of negative width", "bucket=-1h&agg=mean", "bucket"},
		{"a bucket of less than a microsecond", "bucket=1ns&agg=mean", "bucket"},
		{"a bucket that is too wide", "bucket=P300000D&agg=mean", "bucket"},
		{"a bucket of overlapping runs", "bucket=PT1H&agg=mean&mode=overlapping", "bucket"},
		{"a bucket of all versions", "bucket=PT1H&agg=mean&all_versions=true", "bucket"},
		{"a bucket with detail", "bucket=PT1H&agg=mean&detail=true", "bucket"},
		{"an unknown format", "format=xml", "format"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if text := s.must(t, 422, "GET", "/values?"+c.query, key, ""); !strings.Contains(text, c.want) {
				t.Errorf("GET /values?%s: %s, want %s in it", c.query, text, c.want)
			}
		})
	}
}

func TestOverlappingRunsOfOneKnownTimeAreOrderedByValidTime(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	const known = `"known_time":"2025-01-01T00:00:00Z",`
	even := runWith(known, at("2025-01-01T00:00:00Z", "1"), at("2025-01-01T02:00:00Z", "2"))
	odd := runWith(known, at("2025-01-01T01:00:00Z", "3"), at("2025-01-01T03:00:00Z", "4"))
	s.must(t, 200, "POST", "/upload", key, even)
	s.must(t, 200, "POST", "/upload", key, odd)
	const want = "00/load 00=1, 00/load 01=3, 00/load 02=2, 00/load 03=4"
	if got := brief(t, s.must(t, 200, "GET", "/values?mode=overlapping", key, "")); got != want {
		t.Errorf("GET /values?mode=overlapping\nshows %s\nwant  %s (series_key, known_time, valid_time)", got, want)
	}
}

func TestFirstUploadIsThereAsOfItsOwnChangeTime(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	for i := range 20 {
		series := fmt.Sprint("series", i)
		s.must(t, 200, "POST", "/upload", key, runWith("", seriesRow(series, "2025-01-01", "1")))
		path := "/values?series_key=" + series
		change := s.mustRead(t, path+"&detail=true", key)[0].Change
		path += "&as_of=" + url.QueryEscape(change)
		if got := mustDecode[readAnswer](t, s.must(t, 200, "GET", path, key, "")); got.Count != 1 {
			t.Fatalf("as of its own change_time %s the upload has %d values", change, got.Count)
		}
	}
}

// mustHalfHours uploads a series with a value of 1 each half hour of a time, given as two instants.
func (s *testServer) mustHalfHours(t *testing.T, key, series, start, end string) {
	t.Helper()
	lines := []byte("valid_time,value_key,value\n")
	last := mustInstant(t, end)
	for at := mustInstant(t, start); at.Before(last); at = at.Add(30 * time.Minute) {
		lines = fmt.Appendf(lines, "%s,%s,1\n", at.Format(time.RFC3339), series)
	}
	s.must(t, 200, "POST", "/upload?run_start_time=2025-01-01", key, string(lines), "Content-Type: text/csv")
}

// mustInstant is a time such as 2025-01-31T23:30.
func mustInstant(t *testing.T, text string) time.Time {
	t.Helper()
	at, err := time.Parse("2006-01-02T15:04", text)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func TestBucketsFollowTheCalendarOfTheirZone(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	// Each case has a value every half hour from start up to end. What it wants is by hand: of each bucket when it
	// begins in UTC, and how many half hours it has.
	for i, c := range []struct{ name, tz, bucket, start, end, want string }{
		{"days are UTC's by default", "", "P1D", "2025-03-30T00:00", "2025-04-01T00:00",
			"2025-03-30T00:00=48, 2025-03-31T00:00=48"},
		{"a day of 23 hours", "Europe/Berlin", "P1D", "2025-03-28T23:00", "2025-03-31T22:00",
			"2025-03-28T23:00=48, 2025-03-29T23:00=46, 2025-03-30T22:00=48"},
		{"a day of 25 hours", "Europe/Berlin", "P1D", "2025-10-24T22:00", "2025-10-27T23:00",
			"2025-10-24T22:00=48, 2025-10-25T22:00=50, 2025-10-26T23:00=48"},
		{"a day of 24 hours and a half", "Australia/Lord_Howe", "P1D", "2025-04-04T13:00", "2025-04-07T13:30",
			"2025-04-04T13:00=48, 2025-04-05T13:00=49, 2025-04-06T13:30=48"},
		{"a day of 23 hours and a half", "Australia/Lord_Howe", "P1D", "2025-10-03T13:30", "2025-10-06T13:00",
			"2025-10-03T13:30=48, 2025-10-04T13:30=47, 2025-10-05T13:00=48"},
		{"a day that begins at one in Brazil", "America/Sao_Paulo", "P1D", "2018-11-03T03:00", "2018-11-06T02:00",
			"2018-11-03T03:00=48, 2018-11-04T03:00=46, 2018-11-05T02:00=48"},
		{"a day that ends with eleven at night twice", "America/Sao_Paulo", "P1D", "2018-02-16T02:00",
			"2018-02-19T03:00", "2018-02-16T02:00=48, 2018-02-17T02:00=50, 2018-02-18T03:00=48"},
		{"a day that begins at one in Lebanon", "Asia/Beirut", "P1D", "2022-03-25T22:00", "2022-03-28T21:00",
			"2022-03-25T22:00=48, 2022-03-26T22:00=46, 2022-03-27T21:00=48"},
		{"a day that begins at one in Egypt", "Africa/Cairo", "P1D", "2024-04-24T22:00", "2024-04-27T21:00",
			"2024-04-24T22:00=48, 2024-04-25T22:00=46, 2024-04-26T21:00=48"},
		{"a day whose first hour comes twice", "America/Havana", "P1D", "2024-11-02T04:00", "2024-11-05T05:00",
			"2024-11-02T04:00=48, 2024-11-03T04:00=50, 2024-11-04T05:00=48"},
		{"a day whose first minute is before the last hour of the one before", "America/St_Johns", "P1D",
			"2006-10-28T02:30", "2006-10-31T03:30", "2006-10-28T02:30=48, 2006-10-29T02:30=50, 2006-10-30T03:30=48"},
		{"a day that was left out", "Pacific/Apia", "P1D", "2011-12-29T10:00", "2012-01-01T10:00",
			"2011-12-29T10:00=48, 2011-12-30T10:00=48, 2011-12-31T10:00=48"},
		{"two days of which the first was left out", "Pacific/Apia", "P2D", "2011-12-29T10:00", "2012-01-01T10:00",
			"2011-12-28T10:00=48, 2011-12-30T10:00=48, 2011-12-31T10:00=48"},
		{"hours of a day are exact", "Europe/Berlin", "24h", "2025-03-29T00:00", "2025-03-31T00:00",
			"2025-03-29T00:00=48, 2025-03-30T00:00=48"},
		{"so is a day without its P", "Europe/Berlin", "1d", "2025-03-29T00:00", "2025-03-31T00:00",
			"2025-03-29T00:00=48, 2025-03-30T00:00=48"},
		{"and hours as ISO 8601 has them", "Europe/Berlin", "PT24H", "2025-03-29T00:00", "2025-03-31T00:00",
			"2025-03-29T00:00=48, 2025-03-30T00:00=48"},
		{"a week without its P begins on Thursdays", "", "1W", "2025-01-01T00:00", "2025-01-03T00:00",
			"2024-12-26T00:00=48, 2025-01-02T00:00=48"},
		{"weeks begin on Mondays", "", "P1W", "2025-01-05T00:00", "2025-01-07T00:00",
			"2024-12-30T00:00=48, 2025-01-06T00:00=48"},
		{"seven days are counted from 1970-01-01, a Thursday", "", "P7D", "2025-01-01T00:00", "2025-01-03T00:00",
			"2024-12-26T00:00=48, 2025-01-02T00:00=48"},
		{"weeks in a zone", "America/New_York", "P1W", "2025-03-03T05:00", "2025-03-17T04:00",
			"2025-03-03T05:00=334, 2025-03-10T04:00=336"},
		{"two weeks since 1969-12-29", "", "P2W", "1970-01-11T23:00", "1970-01-12T01:00",
			"1969-12-29T00:00=2, 1970-01-12T00:00=2"},
		{"weeks before that", "", "P1W", "1969-12-28T23:00", "1969-12-29T01:00",
			"1969-12-22T00:00=2, 1969-12-29T00:00=2"},
		{"a month of 743 hours", "Europe/Berlin", "P1M", "2025-02-28T23:00", "2025-04-30T22:00",
			"2025-02-28T23:00=1486, 2025-03-31T22:00=1440"},
		{"a leap month", "Asia/Kolkata", "P1M", "2024-01-31T18:00", "2024-02-29T19:00",
			"2023-12-31T18:30=1, 2024-01-31T18:30=1392, 2024-02-29T18:30=1"},
		{"quarters", "Europe/Berlin", "P3M", "2024-12-31T22:00", "2025-03-31T23:00",
			"2024-09-30T22:00=2, 2024-12-31T23:00=4318, 2025-03-31T22:00=2"},
		{"years", "Asia/Tokyo", "P1Y", "2024-12-31T14:00", "2024-12-31T16:00",
			"2023-12-31T15:00=2, 2024-12-31T15:00=2"},
		{"five years", "", "P5Y", "2024-12-31T23:00", "2025-01-01T01:00",
			"2020-01-01T00:00=2, 2025-01-01T00:00=2"},
		{"eighteen months", "", "P18M", "1973-01-01T00:00", "1973-01-01T01:00", "1973-01-01T00:00=2"},
		{"days before 1970", "America/New_York", "P1D", "1967-04-29T05:00", "1967-05-02T04:00",
			"1967-04-29T05:00=48, 1967-04-30T05:00=46, 1967-05-01T04:00=48"},
		{"three days before 1970", "", "P3D", "1969-12-31T23:00", "1970-01-01T01:00",
			"1969-12-29T00:00=2, 1970-01-01T00:00=2"},
		{"quarters before 1970", "", "P3M", "1969-09-30T23:00", "1969-10-01T01:00",
			"1969-07-01T00:00=2, 1969-10-01T00:00=2"},
		{"seven years before 1970", "", "P7Y", "1962-12-31T23:00", "1963-01-01T01:00",
			"1956-01-01T00:00=2, 1963-01-01T00:00=2"},
		{"local mean time", "Europe/Berlin", "P1M", "1892-12-31T23:00", "1893-01-01T00:00",
			"1892-11-30T23:06=1, 1892-12-31T23:06=1"},
		{"the longest", "", "P999Y", "1677-01-01T00:00", "1677-01-01T01:00", "0971-01-01T00:00=2"},
		{"a year that has not been decided yet", "Europe/Berlin", "P1M", "2262-06-30T21:00", "2262-06-30T23:00",
			"2262-05-31T22:00=2, 2262-06-30T22:00=2"},
		{"the last day of a leap year, for which Go has no table", "Europe/Berlin", "P1D", "2040-12-30T22:00",
			"2041-01-01T00:00", "2040-12-29T23:00=2, 2040-12-30T23:00=48, 2040-12-31T23:00=2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			series := fmt.Sprint("s", i)
			s.mustHalfHours(t, key, series, c.start, c.end)
			path := "/values?agg=count&series_key=" + series + "&bucket=" + c.bucket
			if c.tz != "" {
				path += "&tz=" + c.tz
			}
			var got []string
			for _, row := range s.mustRead(t, path, key) {
				got = append(got, fmt.Sprintf("%s=%g", row.Valid.UTC().Format("2006-01-02T15:04"), *row.Value))
			}
			if strings.Join(got, ", ") != c.want {
				t.Errorf("%s\nshows %s\nwant  %s", path, strings.Join(got, ", "), c.want)
			}
		})
	}
}

// PostgreSQL has time zones of its own. Of a midnight that comes twice it takes the second, so Havana is not among
// these; and a day that begins before the end of the one before it splits, so neither is St. John's.
func TestCalendarBucketsAgreeWithPostgreSQL(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	stretches := [][2]string{
		{"1969-07-01T00:00", "1970-07-01T00:00"},
		{"2011-10-01T00:00", "2012-04-01T00:00"},
		{"2017-10-01T00:00", "2019-04-01T00:00"},
	}
	mustExec(t, s.db, "CREATE TABLE half_hours (series_key text, valid_time timestamptz)")
	for _, c := range stretches {
		s.mustHalfHours(t, key, c[0], c[0], c[1])
		mustExec(t, s.db, `INSERT INTO half_hours SELECT $1, t FROM generate_series(
			$2::timestamptz, $3::timestamptz - interval '30 minutes', interval '30 minutes') AS t`, c[0], c[0], c[1])
	}
	units := map[string]string{"P1D": "day", "P1W": "week", "P1M": "month", "P3M": "quarter", "P1Y": "year"}
	for _, tz := range []string{"UTC", "Europe/Berlin", "Europe/London", "Europe/Dublin", "America/New_York",
		"America/Sao_Paulo", "America/Caracas", "Australia/Lord_Howe", "Asia/Kathmandu", "Asia/Beirut", "Pacific/Apia",
		"Pacific/Chatham", "Africa/Cairo", "Africa/Casablanca", "Antarctica/Troll"} {
		for bucket, unit := range units {
			t.Run(tz+" "+unit, func(t *testing.T) {
				want := mustQuery(t, s.db, `SELECT string_agg(line, ' ' ORDER BY line COLLATE "C") FROM (
					SELECT series_key || to_char(date_trunc($1, valid_time, $2) AT TIME ZONE 'UTC',
					       '@YYYY-MM-DD"T"HH24:MI=') || count(*) AS line
					FROM half_hours GROUP BY series_key, date_trunc($1, valid_time, $2)) AS x`, unit, tz)
				var got []string
				for _, row := range s.mustRead(t, "/values?agg=sum&bucket="+bucket+"&tz="+tz, key) {
					got = append(got, fmt.Sprintf("%s@%s=%g", row.Key, row.Valid.UTC().Format("2006-01-02T15:04"), *row.Value))
				}
				for i, line := range strings.Fields(want) {
					if i >= len(got) || got[i] != line {
						t.Fatalf("PostgreSQL has %s, and after %d that agree it shows %v", line, i, got[i:min(i+1, len(got))])
					}
				}
				if len(got) != strings.Count(want, " ")+1 {
					t.Errorf("it shows %d buckets, PostgreSQL fewer", len(got))
				}
			})
		}
	}
}

// expectTiles checks that the bucket around an instant has it, and that all in it are in the same bucket.
func expectTiles(t *testing.T, w width, z zone, at timestamp) (begin timestamp) {
	t.Helper()
	begin, end := w.around(at, z)
	if begin <= 0 || begin > at || end <= at {
		t.Fatalf("%s is in the bucket of %+v in %s from %s up to %s", at, w, z, begin, end)
	}
	for _, inside := range []timestamp{begin, end - 1} {
		if b, e := w.around(inside, z); b != begin || e != end {
			t.Fatalf("%s is in the bucket of %+v in %s from %s up to %s, but %s in that from %s up to %s",
				at, w, z, begin, end, inside, b, e)
		}
	}
	return begin
}

// Every zone that PostgreSQL knows is tried at random moments and around those at which its clock changes.
func TestCalendarBucketsOfEveryZoneTile(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	names := strings.Fields(mustQuery(t, s.db,
		`SELECT string_agg(name, ' ') FROM pg_timezone_names WHERE name ~ '^[A-Z]'`))
	if len(names) < 300 {
		t.Fatalf("PostgreSQL knows only %q", names)
	}
	dateOf := func(at timestamp, z zone) int { return daysSince1970(at.utc().In(z.Location)) }
	for _, name := range names {
		var z zone
		if err := z.UnmarshalText([]byte(name)); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, text := range []string{"P1D", "P1W", "P1M", "P7Y", "P999Y", "P9999D", "P9999W", "P9999M"} {
			var w width
			if err := w.UnmarshalText([]byte(text)); err != nil {
				t.Fatal(text, err)
			}
			for range 5 {
				at := firstTime + timestamp(rand.Int63n(int64(lastTime-firstTime)))
				begin := expectTiles(t, w, z, at)
				if dateOf(begin-1, z) >= dateOf(begin, z) {
					t.Errorf("in %s no date begins at %s", name, begin)
				}
				_, change := at.utc().In(z.Location).ZoneBounds()
				if at = timestampOf(change); at < firstTime || at >= lastTime {
					continue
				}
				expectTiles(t, w, z, at)
				expectTiles(t, w, z, at-timestamp(rand.Int63n(int64(day))))
			}
		}
	}
}

func TestSeveralAggregatesAreColumnsInTheOrderAskedFor(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, series := mustPicture(t, s)
	const path = "/values?series_key=load&bucket=PT2H"
	row := func(begin, values string) string {
		return `{"valid_time":"2025-01-01T` + begin + `:00:00+00:00","series_id":"` + series["load"] + `",` + values +
			`,"series_key":"load","series_unit":"dimensionless"}`
	}
	line := func(begin, values string) string {
		return "2025-01-01T" + begin + ":00:00+00:00," + series["load"] + "," + values + `,"load","dimensionless",` + "\n"
	}
	for _, c := range []struct{ name, query, want string }{
		{"one is the value", "&agg=count", `{"data":[` + row("00", `"value":2.0`) + "," + row("02", `"value":2.0`) +
			`],"count":2,"more":false}` + "\n"},
		{"two", "&agg=max&agg=count", `{"data":[` + row("00", `"max":2.5,"count":2.0`) + "," +
			row("02", `"max":9.0,"count":2.0`) + `],"count":2,"more":false}` + "\n"},
		{"all, as CSV", "&format=csv&agg=last&agg=mean&agg=first&agg=sum&agg=min&agg=count&agg=max",
			"valid_time,series_id,last,mean,first,sum,min,count,max,series_key,series_unit,valid_time_end\n" +
				line("00", "2.5,1.75,1.0,3.5,1.0,2.0,2.5") + line("02", "9.0,6.375,3.75,12.75,3.75,2.0,9.0")},
		{"one as CSV", "&format=csv&agg=first", "valid_time,series_id,value,series_key,series_unit,valid_time_end\n" +
			line("00", "1.0") + line("02", "3.75")},
		{"a limit counts rows", "&agg=max&agg=min&limit=1", `{"data":[` + row("00", `"max":2.5,"min":1.0`) +
			`],"count":1,"more":true}` + "\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := s.must(t, 200, "GET", path+c.query, key, ""); got != c.want {
				t.Errorf("GET %s\nshows %s\nwant  %s", path+c.query, got, c.want)
			}
		})
	}
	t.Run("a sum beyond a float is named", func(t *testing.T) {
		s.must(t, 200, "POST", "/upload", key, runWith("",
			seriesRow("huge", "2025-01-01T00:00Z", "1.7e308"), seriesRow("huge", "2025-01-01T01:00Z", "1.7e308")))
		text := s.must(t, 422, "GET", "/values?series_key=huge&bucket=P1D&agg=max&agg=sum", key, "")
		expectIn(t, "the refusal", text, "sum", "huge")
	})
}

func TestGateClosesAtALocalTime(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	// What each case wants is by hand: the moment up to which a run must be known.
	for i, c := range []struct{ name, valid, daysAhead, timeOfDay, tz, want string }{
		{"noon of the day before in UTC", "2025-01-02T00:00:00Z", "1", "12:00", "UTC", "2025-01-01T12:00:00Z"},
		{"of the last moment of that day", "2025-01-02T23:59:59.999999Z", "1", "12:00", "UTC", "2025-01-01T12:00:00Z"},
		{"of the same day", "2025-01-02T23:00:00Z", "0", "00:00", "UTC", "2025-01-02T00:00:00Z"},
		{"over the end of a year and a leap day", "2024-03-01T12:00:00Z", "61", "23:59:59", "UTC", "2023-12-31T23:59:59Z"},
		{"in Berlin in winter", "2025-01-01T23:00:00Z", "1", "09:30", "Europe/Berlin", "2025-01-01T08:30:00Z"},
		{"a moment before midnight there", "2025-01-01T22:59:59Z", "1", "09:30", "Europe/Berlin", "2024-12-31T08:30:00Z"},
		{"in Berlin in summer", "2025-07-02T12:00:00Z", "1", "09:30", "Europe/Berlin", "2025-07-01T07:30:00Z"},
		{"before the clock goes forward, of a day after", "2025-03-31T12:00:00Z", "2", "09:30", "Europe/Berlin",
			"2025-03-29T08:30:00Z"},
		{"a time that the clock skips", "2025-03-31T12:00:00Z", "1", "02:30", "Europe/Berlin", "2025-03-30T01:00:00Z"},
		{"the time to which it jumps", "2025-03-31T12:00:00Z", "1", "03:00", "Europe/Berlin", "2025-03-30T01:00:00Z"},
		{"a second later", "2025-03-31T12:00:00Z", "1", "03:00:01", "Europe/Berlin", "2025-03-30T01:00:01Z"},
		{"a time that the clock repeats", "2025-10-27T12:00:00Z", "1", "02:30", "Europe/Berlin", "2025-10-26T00:30:00Z"},
		{"the time after which it does not", "2025-10-27T12:00:00Z", "1", "03:00", "Europe/Berlin", "2025-10-26T02:00:00Z"},
		{"a midnight that is skipped", "2018-11-05T12:00:00Z", "1", "00:00", "America/Sao_Paulo", "2018-11-04T03:00:00Z"},
		{"of the first moment after it", "2018-11-04T03:00:00Z", "0", "00:30", "America/Sao_Paulo", "2018-11-04T03:00:00Z"},
		{"of the last moment before it", "2018-11-04T02:59:59Z", "0", "00:30", "America/Sao_Paulo", "2018-11-03T03:30:00Z"},
		{"of a time that comes twice, the second time", "2018-02-18T02:30:00Z", "0", "23:30", "America/Sao_Paulo",
			"2018-02-18T01:30:00Z"},
		{"a midnight that comes twice", "2024-11-04T12:00:00Z", "1", "00:00", "America/Havana", "2024-11-03T04:00:00Z"},
		{"a day that was left out", "2011-12-30T12:00:00Z", "1", "09:00", "Pacific/Apia", "2011-12-30T10:00:00Z"},
		{"the day before that", "2011-12-30T12:00:00Z", "2", "09:00", "Pacific/Apia", "2011-12-29T19:00:00Z"},
		{"half an hour skipped", "2025-10-04T13:30:00Z", "0", "02:15", "Australia/Lord_Howe", "2025-10-04T15:30:00Z"},
		{"half an hour repeated", "2025-04-05T13:00:00Z", "0", "01:45", "Australia/Lord_Howe", "2025-04-05T14:45:00Z"},
		{"of a day that has begun, although its clock shows the one before", "2006-10-29T03:00:00Z", "1", "12:00",
			"America/St_Johns", "2006-10-28T14:30:00Z"},
		{"before 1970", "1969-12-31T12:00:00Z", "1", "18:00", "America/New_York", "1969-12-30T23:00:00Z"},
		{"as many days ahead as can be", "2200-01-01T12:00:00Z", "65535", "12:00", "UTC", "2020-07-28T12:00:00Z"},
	} {
		t.Run(c.name, func(t *testing.T) {
			gate, err := time.Parse(time.RFC3339, c.want)
			if err != nil {
				t.Fatal(err)
			}
			series := fmt.Sprint("s", i)
			for value, known := range []time.Time{gate.Add(-time.Second), gate, gate.Add(time.Microsecond)} {
				s.must(t, 200, "POST", "/upload", key, runWith(
					`"known_time":"`+known.Format(time.RFC3339Nano)+`",`, seriesRow(series, c.valid, fmt.Sprint(value))))
			}
			path := fmt.Sprintf("/values?series_key=%s&days_ahead=%s&time_of_day=%s&tz=%s",
				series, c.daysAhead, c.timeOfDay, c.tz)
			rows := s.mustRead(t, path+"&mode=overlapping", key)
			if len(rows) != 2 || *rows[0].Value != 0 || *rows[1].Value != 1 {
				t.Errorf("%s shows %v, want what was known up to %s", path, jsonText(rows), c.want)
			}
			if rows := s.mustRead(t, path, key); len(rows) != 1 || *rows[0].Value != 1 {
				t.Errorf("%s shows %v, want what was known at %s", path, jsonText(rows), c.want)
			}
		})
	}
}

func TestChangedSinceShowsWhatWasWrittenLater(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, _ := mustPicture(t, s)
	changes := func(where string) string { // the last change_time
		return url.QueryEscape(mustQuery(t, s.db, `SELECT iso_time(max(change_time)) FROM values_table `+where))
	}
	uploaded, corrected := changes(`WHERE version = 1`), changes(``)
	first := changes(`JOIN runs_table USING (tenant_id, run_id) WHERE workflow_id = 'first'`)
	const second = "load 01=2.5, load 02=3.75, load 03=9, price 00-01=10, price 00-02=20"
	for _, c := range []struct{ name, query, want string }{
		{"since the first run", "changed_since=" + first, second},
		{"since the uploads", "changed_since=" + uploaded, "load 02=3.75"},
		{"since the correction", "changed_since=" + corrected, ""},
		{"up to the first run", "as_of=" + first, "load 00=1, load 01=2, load 02=null, wind 00=0.5"},
		{"between the first run and the correction", "mode=overlapping&series_key=load&changed_since=" + first + "&as_of=" + uploaded,
			"12/load 01=2.5, 12/load 02=3.5, 12/load 03=4.5, 12/load 03=9"},
		{"it comes before flat chooses", "series_key=load&end_valid=2025-01-01T02:00:00Z&changed_since=" + first, "load 01=2.5"},
		{"the latest of what was written later", "latest=true&changed_since=" + uploaded, "load 02=3.75"},
		{"all versions", "all_versions=true&changed_since=" + uploaded, "12/load 02=3.75 v2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := brief(t, s.must(t, 200, "GET", "/values?"+c.query, key, "")); got != c.want {
				t.Errorf("GET /values?%s\nshows %s\nwant  %s", c.query, got, c.want)
			}
		})
	}
}

// The latest value is sought in the last blocks alone, so a NULL there must not hide the one before it.
func TestLatestLooksBehindNULLs(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	latest := func() string {
		t.Helper()
		return brief(t, s.must(t, 200, "GET", "/values?latest=true", key, ""))
	}
	if got := latest(); got != "" {
		t.Errorf("of nothing the latest is %s", got)
	}
	upload := func(rows ...string) {
		t.Helper()
		s.must(t, 200, "POST", "/upload", key, runWith("", rows...))
	}
	upload(at("2025-01-01T00:00:00Z", "1"), at("2025-01-01T01:00:00Z", "2"))
	for i := range 15 { // one block each
		upload(at(fmt.Sprintf("2025-01-02T%02d:00:00Z", i), fmt.Sprint(i)))
	}
	if got := latest(); got != "load 14=14" {
		t.Errorf("the latest is %s", got)
	}
	for i := range 15 {
		hour := fmt.Sprintf("2025-01-02T%02d:00:00Z", 14-i)
		s.must(t, 200, "PUT", "/values", key, corrections(`{"series_key":"load","valid_time":"`+hour+`","value":null}`))
		want := fmt.Sprintf("load %02d=%d", 13-i, 13-i)
		if i == 14 {
			want = "load 01=2"
		}
		if got := latest(); got != want {
			t.Errorf("after %d corrections to NULL the latest is %s, want %s", i+1, got, want)
		}
	}
	upload(at("2025-01-01T00:00:00Z", "null"), at("2025-01-01T01:00:00Z", "null"))
	if got := latest(); got != "" {
		t.Errorf("where all is NULL the latest is %s", got)
	}
}

// The latest value of a busy series costs about what reading its last hours costs, whatever was before.
func TestLatestDoesNotReadTheHistory(t *testing.T) {
	t.Parallel()
	dsn := mustDatabaseWithTables(t)
	s := mustPlannedStore(t, dsn)
	c := Caller{tenant: tenantA}
	const runs = 400
	for run := range runs { // one each hour, of two days
		if err := uploadHours(s.store, c, hour1(run), run, 48, "s3"); err != nil {
			t.Fatal(err)
		}
	}
	mustExec(t, mustOpen(t, dsn), "VACUUM ANALYZE")
	rowsOfHours, blocksOfHours := s.cost(t, c, func(q *readQuery) { q.start, q.end = hour1(runs-1), lastTime })
	rows, blocks := s.cost(t, c, func(q *readQuery) { q.start, q.end, q.latest = firstTime, lastTime, true })
	if rows != rowsOfHours || blocks > 4*blocksOfHours {
		t.Errorf("the latest value takes %d rows and %d blocks, the last hours %d and %d",
			rows, blocks, rowsOfHours, blocksOfHours)
	}
}

// A window of single values costs what lies in it, and not what lies in the 768 hours before.
func TestWindowOfSingleValuesReadsNoOthers(t *testing.T) {
	t.Parallel()
	dsn := mustDatabaseWithTables(t)
	s := mustPlannedStore(t, dsn)
	c := Caller{tenant: tenantA}
	var keys []string // many series, so that the values of one lie apart
	for n := range 40 {
		keys = append(keys, fmt.Sprintf("s%d", n))
	}
	const uploads = 300
	for i := range uploads { // one each hour
		if err := uploadHours(s.store, c, hour1(i), i, 1, keys...); err != nil {
			t.Fatal(err)
		}
	}
	mustExec(t, mustOpen(t, dsn), "VACUUM ANALYZE")
	for _, kind := range []struct {
		name   string
		change func(*readQuery)
	}{
		{"by key", func(q *readQuery) { q.series = []seriesRef{{Key: "s3"}} }},
		{"that match", func(q *readQuery) { q.match = []pattern{"s3"} }},
		{"as of a moment", func(q *readQuery) { q.series, q.asOf = []seriesRef{{Key: "s3"}}, timestampOf(time.Now()) }},
		{"overlapping", func(q *readQuery) { q.series, q.overlapping = []seriesRef{{Key: "s3"}}, true }},
	} {
		t.Run(kind.name, func(t *testing.T) {
			window := func(from int) (rows, blocks int) {
				return s.cost(t, c, func(q *readQuery) {
					kind.change(q)
					q.start, q.end = hour1(from), hour1(from+3)
				})
			}
			rowsAtFirst, blocksAtFirst := window(0)
			rows, blocks := window(uploads - 3)
			if rows != 3 || rowsAtFirst != 3 || blocks > 2*blocksAtFirst {
				t.Errorf("the first window takes %d rows and %d blocks, the last %d and %d",
					rowsAtFirst, blocksAtFirst, rows, blocks)
			}
		})
	}
}

func TestListOfSeriesIsFilteredAndTellsWhatIsStored(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, series := mustPicture(t, s)
	s.must(t, 200, "POST", "/series", key, `{"name":"empty","unit":"MW"}`)
	s.must(t, 200, "POST", "/upload", key, runWith("", seriesRow("wind", "2025-01-01T00:00:00.5Z", "1")))
	change := func(name string) string {
		return mustQuery(t, s.db, `SELECT to_char(max(change_time) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')
			FROM value_blocks WHERE series_id = $1`, series[name])
	}
	const listed = `"description":null,"unit":"dimensionless"`
	stats := func(name, first, last, values string) string {
		return `{"series_key":"` + name + `",` + listed + `,"first_valid_time":"2025-01-01T` + first +
			`+00:00","last_valid_time":"2025-01-01T` + last + `+00:00","values":` + values +
			`,"last_change_time":"` + change(name) + `"}`
	}
	load := stats("load", "00:00:00", "03:00:00", "8") // a NULL, a correction and three runs
	price := stats("price", "00:00:00", "00:00:00", "2")
	wind := stats("wind", "00:00:00", "00:00:00.500000", "2")
	const empty = `{"series_key":"empty","description":null,"unit":"MW","first_valid_time":null,` +
		`"last_valid_time":null,"values":0,"last_change_time":null}`
	for _, c := range []struct {
		name, query string
		want        []string
	}{
		{"what is stored of each", "?stats=true", []string{empty, load, price, wind}},
		{"what is stored of some", "?stats=true&match=*d&match=p????", []string{load, price, wind}},
		{"a match alone", "?match=w*", []string{`{"series_key":"wind",` + listed + `}`}},
		{"without stats", "?stats=false&match=load", []string{`{"series_key":"load",` + listed + `}`}},
		{"a match of nothing", "?match=x", nil},
		{"a match of nothing, with stats", "?match=%25&stats=true", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := s.must(t, 200, "GET", "/list_timeseries"+c.query, key, "")
			got := regexp.MustCompile(`\{"series_key[^}]*\}`).FindAllString(text, -1)
			if !slices.Equal(got, c.want) || !json.Valid([]byte(text)) {
				t.Errorf("%s, want %s", text, c.want)
			}
		})
	}
	s.runRequests(t, key, []requestCase{
		{"stats that is not true or false", "GET", "/list_timeseries?stats=all", "", 422, []string{"stats"}},
		{"an empty match", "GET", "/list_timeseries?match=", "", 422, []string{"match"}},
	})
}

// ---- Reads against a naive model

// A history is some uploads, corrections and withdrawals of one tenant, sent over HTTP and mirrored in the plainest possible model:
// a list of every version ever written. Times are microseconds since 1970.
type history struct {
	s        *testServer
	rng      *rand.Rand
	tenant   string
	keys     [2]string  // of two users
	runs     []modelRun // in the order of insertion
	versions []modelVersion
	series   map[string]modelSeries
	moments  []modelMoment
	day      int64 // when the first valid_time can be
}

type modelRun struct {
	id         string
	workflow   string
	known      int64
	born       int    // how many moments there were before it
	gone       int    // if it is withdrawn, how many moments there were before that; there was one
	withdrawal string // what that was answered
}

type modelSeries struct {
	id   string
	born int // how many moments there were before it
}

// spot is where a value can be: a series, a valid_time, and the end of an interval or 0.
type spot struct {
	series     string
	valid, end int64
}

// slot is a spot in one run, an index of history.runs. Its versions replace each other.
type slot struct {
	spot
	run int
}

type modelVersion struct {
	slot
	number     int
	value, old *float64 // old is of the version before it
	note, by   string
	tags       []string
	batch      int // of a correction; those of one request have one change_time
}

// modelMoment is a time by the database's clock, how many versions there were then, and what a read answered then.
type modelMoment struct {
	at       string
	versions int
	query    url.Values
	answer   string
}

const (
	minute = int64(time.Minute / time.Microsecond)
	hour   = 60 * minute
)

// modelDays are what histories are about: some hours from each of these. In the first two years begin
// somewhere, one of them before 1970; in the others a clock of modelZones changes.
var modelDays = []time.Time{
	time.Date(1968, 12, 31, 20, 0, 0, 0, time.UTC),
	time.Date(2024, 12, 31, 20, 0, 0, 0, time.UTC),
	time.Date(2018, 11, 4, 0, 0, 0, 0, time.UTC),   // America/Sao_Paulo: midnight is skipped
	time.Date(2006, 10, 28, 23, 0, 0, 0, time.UTC), // America/St_Johns: midnight comes twice
	time.Date(2011, 12, 30, 6, 0, 0, 0, time.UTC),  // Pacific/Apia: a day is skipped
	time.Date(2025, 4, 5, 10, 0, 0, 0, time.UTC),   // Australia/Lord_Howe: half an hour comes twice
	time.Date(2025, 10, 25, 21, 0, 0, 0, time.UTC), // Europe/Berlin: an hour comes twice
}

var modelZones = []string{"UTC", "America/Sao_Paulo", "America/St_Johns", "Pacific/Apia", "Australia/Lord_Howe",
	"Europe/Berlin"}

// modelKeys are the keys of series. Some have characters that mean something to SQL's LIKE.
var modelKeys = []string{"a", "a_c", "b%c"}

// modelSpans are the durations that questions ask for, as lead or as bucket.
var modelSpans = map[string]int64{
	"0s": 0, "7m": 7 * minute, "1h": hour, "2h": 2 * hour, "PT3H": 3 * hour, "PT6H": 6 * hour,
	"PT20H30M": 20*hour + 30*minute, "P1D": 24 * hour, "24h": 24 * hour,
}

// modelUnits are buckets of the calendar: each gives the number of the one that a date is in.
var modelUnits = map[string]func(date time.Time) int{
	"P1D": daysSince1970,
	"P2D": func(date time.Time) int { return floorDiv(daysSince1970(date), 2) },
	"P1W": func(date time.Time) int { return floorDiv(daysSince1970(date)+3, 7) },
	"P1M": monthsSince1970,
	"P3M": func(date time.Time) int { return floorDiv(monthsSince1970(date), 3) },
	"P1Y": time.Time.Year,
	"P2Y": func(date time.Time) int { return floorDiv(date.Year()-1970, 2) },
}

func daysSince1970(date time.Time) int {
	return floorDiv(int(time.Date(date.Year(), date.Month(), date.Day(), 0, 0, 0, 0, time.UTC).Unix()), 24*60*60)
}

func monthsSince1970(date time.Time) int { return 12*(date.Year()-1970) + int(date.Month()) - 1 }

func floorMod(a, b int) int { return (a%b + b) % b }

func floorDiv(a, b int) int { return (a - floorMod(a, b)) / b }

// modelBucket is a bucket of the calendar, by a time in it, that time's half hour.
type modelBucket struct {
	t          int64
	bucket, tz string
}

var modelBegins sync.Map // of a modelBucket when it begins: to find that takes milliseconds

// modelBegin is when the bucket begins that t is in. It looks at each half hour before: the last of all dates that a
// clock has shown up to t is the one that counts.
func modelBegin(t int64, bucket, tz string) int64 {
	t -= int64(floorMod(int(t), int(30*minute)))
	key := modelBucket{t, bucket, tz}
	if begin, found := modelBegins.Load(key); found {
		return begin.(int64)
	}
	zone := mustZone(tz)
	number := func(u int64) int { return modelUnits[bucket](time.UnixMicro(u).In(zone)) }
	const longest = 50 // hours for which a clock may show an earlier date again
	last := number(t)
	for u := t; u > t-longest*hour; u -= 30 * minute {
		last = max(last, number(u))
	}
	begin := t
	for u := t; u > begin-longest*hour; u -= 30 * minute {
		if number(u) >= last {
			begin = u
		}
	}
	modelBegins.Store(key, begin)
	return begin
}

// mustZone is a zone by its name; "" is UTC.
func mustZone(tz string) *time.Location {
	zone, err := time.LoadLocation(tz)
	if err != nil {
		panic(err)
	}
	return zone
}

func iso(t int64) string { return time.UnixMicro(t).UTC().Format("2006-01-02T15:04:05.999999-07:00") }

var modelSeed = flag.Int64("seed", 0, "the first history's seed in TestReadsAgreeWithNaiveModel; 0: a random one")

func TestReadsAgreeWithNaiveModel(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	s.db.SetMaxIdleConns(16)
	base := *modelSeed
	if base == 0 {
		base = rand.Int63()
	}
	var next, failed atomic.Int64
	together(8, func(int) {
		for failed.Load() < 3 {
			i := next.Add(1) - 1
			if i >= int64(*histories) {
				return
			}
			h := &history{s: s, rng: rand.New(rand.NewSource(base + i)), series: map[string]modelSeries{}}
			h.day = pick(h.rng, modelDays...).UnixMicro()
			if err := h.play(); err != nil {
				failed.Add(1)
				t.Errorf("%v\nagain: go test -run TestReadsAgreeWithNaiveModel -histories 1 -seed %d", err, base+i)
			}
		}
	})
}

// play does some random uploads and corrections, reads after each, and in the end reads as of each moment.
func (h *history) play() error {
	if err := h.createUsers(); err != nil {
		return err
	}
	for step := range 2 + h.rng.Intn(5) {
		act := h.correct
		switch {
		case step == 0 || h.chance(40):
			act = h.upload
		case h.chance(25):
			act = h.withdraw
		}
		if err := act(h.rng.Intn(2)); err != nil {
			return err
		}
		if err := h.remember(); err != nil {
			return err
		}
	}
	for i := range h.moments {
		if err := h.lookBack(i); err != nil {
			return err
		}
	}
	return h.compareFeed()
}

// createUsers writes the users into the table: two thousand commands would take too long.
func (h *history) createUsers() error {
	h.tenant = fmt.Sprintf("%08x-%04x-4000-8000-%012x", h.rng.Uint32(), h.rng.Intn(1<<16), h.rng.Int63n(1<<48))
	for i := range h.keys {
		key, id, _ := newKey()
		digest := sha256.Sum256([]byte(key))
		h.keys[i] = key
		_, err := h.s.db.Exec(`
			WITH u AS (INSERT INTO users_table (tenant_id, email) VALUES ($1, $2) RETURNING *)
			INSERT INTO keys_table (key_id, tenant_id, user_id, name, key_digest, access)
			SELECT $3, tenant_id, user_id, 'default', $4, 'rw' FROM u`,
			h.tenant, h.email(i), id, digest[:])
		if err != nil {
			return err
		}
	}
	return nil
}

// remember reads, and makes a moment of the answer.
func (h *history) remember() error {
	m := modelMoment{versions: len(h.versions)}
	const now = `SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')`
	if err := h.s.db.QueryRow(now).Scan(&m.at); err != nil {
		return err
	}
	m.query = h.question()
	answer, err := h.compare(m.query, len(h.versions), len(h.moments))
	if err != nil {
		return err
	}
	m.answer = answer
	h.moments = append(h.moments, m)
	return nil
}

var suggestion = regexp.MustCompile(`; did you mean .*\?`)

// inPresentTense is an answer, with a refusal of a series that there was not in the words of one that there is not.
func inPresentTense(answer string) string {
	return suggestion.ReplaceAllString(strings.Replace(answer, "as of then there was no", "there is no", 1), "")
}

// lookBack has the answer of a moment repeated, and asks another question as of then.
func (h *history) lookBack(moment int) error {
	m := h.moments[moment]
	m.query.Set("as_of", m.at)
	_, again, err := h.s.do("GET", "/values?"+m.query.Encode(), h.keys[0], "")
	if err != nil || inPresentTense(again) != inPresentTense(m.answer) {
		return fmt.Errorf("GET /values?%s\nanswers  %s\nanswered %s at that moment (%v)",
			m.query.Encode(), again, m.answer, err)
	}
	query := h.question()
	query.Set("as_of", m.at)
	_, err = h.compare(query, m.versions, moment)
	return err
}

func (h *history) email(user int) string { return fmt.Sprintf("user%d@example.com", user) }

// chance is true in so many of a hundred cases.
func (h *history) chance(percent int) bool { return h.rng.Intn(100) < percent }

// pick returns a random one.
func pick[T any](rng *rand.Rand, from ...T) T { return from[rng.Intn(len(from))] }

// point returns a random valid_time, and an end or 0. There are few, so that they often meet.
func (h *history) point() (valid, end int64) {
	valid = h.day + int64(h.rng.Intn(8))*hour
	if h.chance(10) {
		valid += 40 * 24 * hour
	}
	return valid, pick(h.rng, 0, 0, 0, valid+hour, valid+2*hour)
}

func (h *history) value() *float64 {
	if h.chance(15) {
		return nil
	}
	f := float64(h.rng.Intn(4)) * 0.5
	if f == 0 && h.chance(50) {
		f = math.Copysign(0, -1)
	}
	return &f
}

// when writes a time in one of the ways that mean the same instant.
func (h *history) when(t int64) string {
	local := time.UnixMicro(t).In(time.FixedZone("", pick(h.rng, 2*3600, -(3*3600+1800))))
	return pick(h.rng, iso(t), local.Format(time.RFC3339Nano), local.UTC().Format("2006-01-02 15:04:05.999999"))
}

// upload sends a random run.
func (h *history) upload(user int) error {
	run := modelRun{workflow: pick(h.rng, "v", "w"), known: h.day - int64(h.rng.Intn(4))*6*hour + pick(h.rng, 0, 0, 3*hour), born: len(h.moments)}
	members := map[string]any{"run_start_time": "2025-01-01", "workflow_id": run.workflow}
	knownNow := h.chance(10) // the server says when
	if !knownNow {
		members["known_time"] = iso(run.known)
	}
	var rows []map[string]any
	for _, p := range h.places() {
		v := modelVersion{slot: slot{p, len(h.runs)}, number: 1, value: h.value(), by: h.email(user)}
		h.versions = append(h.versions, v)
		rows = append(rows, h.row(v))
	}
	path, text, header := h.uploadRequest(members, rows)
	resp, answer, err := h.s.do("POST", path, h.keys[user], text, header...)
	var got uploadAnswer
	if err != nil || resp.StatusCode != 200 || json.Unmarshal([]byte(answer), &got) != nil {
		return fmt.Errorf("POST /upload %s: %v %v %s", text, resp, err, answer)
	}
	for name, id := range got.SeriesIDs {
		series, known := h.series[name]
		if !known {
			h.series[name] = modelSeries{id, len(h.moments)}
		} else if series.id != id {
			return fmt.Errorf("series %s became another", name)
		}
	}
	run.id = got.RunID
	if knownNow {
		err = h.s.db.QueryRow(`SELECT (extract(epoch FROM known_time) * 1000000)::bigint
			FROM runs_table WHERE tenant_id = $1 AND run_id = $2`, h.tenant, run.id).Scan(&run.known)
	}
	h.runs = append(h.runs, run)
	return err
}

// withdraw withdraws a random run, which may be withdrawn already: then it is answered as the first time.
func (h *history) withdraw(user int) error {
	run := &h.runs[h.rng.Intn(len(h.runs))]
	note := pick(h.rng, modelNotes...)
	path := "/runs/" + pick(h.rng, run.id, strings.ToUpper(run.id)) + "/withdraw"
	resp, answer, err := h.s.do("POST", path, h.keys[user], jsonText(map[string]any{"annotation": note.sent}))
	if err != nil || resp.StatusCode != 200 {
		return fmt.Errorf("POST %s: %v %v %s", path, resp, err, answer)
	}
	if run.gone > 0 && answer != run.withdrawal {
		return fmt.Errorf("POST %s again: %s, first %s", path, answer, run.withdrawal)
	}
	if run.gone > 0 {
		return nil
	}
	run.gone = len(h.moments)
	run.withdrawal = answer
	want := fmt.Sprintf(`,"withdrawn_by":%q,"annotation":%s}`, h.email(user), strings.Replace(jsonText(note.stored), `""`, "null", 1))
	if !strings.HasPrefix(answer, `{"run_id":"`+run.id+`","withdrawn_at":"`) || !strings.HasSuffix(answer, want+"\n") {
		return fmt.Errorf("POST %s: %s, want it to end in %s", path, answer, want)
	}
	return nil
}

// withdrawn tells whether a run was withdrawn at a moment.
func (h *history) withdrawn(run, moment int) bool {
	gone := h.runs[run].gone
	return gone > 0 && gone <= moment
}

// places picks where an upload has values, each spot once.
func (h *history) places() []spot {
	var picked []spot
	for range 1 + h.rng.Intn(8) {
		valid, end := h.point()
		picked = append(picked, spot{pick(h.rng, modelKeys...), valid, end})
	}
	if h.chance(1) { // more than one block of values_table
		for i := range int64(1100) {
			picked = append(picked, spot{"a", h.day + i*minute, 0})
		}
	}
	var once []spot
	taken := map[spot]bool{}
	for _, p := range picked {
		if !taken[p] {
			once = append(once, p)
		}
		taken[p] = true
	}
	return once
}

// row makes v a row of an upload.
func (h *history) row(v modelVersion) map[string]any {
	row := map[string]any{"valid_time": h.when(v.valid), "value": v.value}
	if v.end != 0 {
		row["valid_time_end"] = h.when(v.end)
	}
	if series, known := h.series[v.series]; known && h.chance(50) {
		row["series_id"] = series.id
	} else {
		row["value_key"] = v.series
	}
	return row
}

// uploadRequest writes an upload as JSON or as CSV, packed or not. All must store the same.
func (h *history) uploadRequest(run map[string]any, rows []map[string]any) (path, text string, header []string) {
	if h.chance(50) {
		run["value_rows"] = rows
		path, text = "/upload", jsonText(run)
	} else {
		query := url.Values{}
		for name, value := range run {
			query.Set(name, value.(string))
		}
		path, text = "/upload?"+query.Encode(), h.linesOfCSV(rows)
		header = append(header, "Content-Type: text/csv")
	}
	if h.chance(33) {
		text = gzipped(text)
		header = append(header, "Content-Encoding: gzip")
	}
	return path, text, header
}

func (h *history) linesOfCSV(rows []map[string]any) string {
	columns := []string{"series_id", "valid_time", "value", "value_key", "valid_time_end"}
	lines := []string{strings.Join(columns, ",")}
	for _, row := range rows {
		var cells []string
		for _, column := range columns {
			cells = append(cells, h.cell(row[column]))
		}
		lines = append(lines, strings.Join(cells, ","))
	}
	return strings.Join(lines, "\n")
}

// cell writes a member of a row as a cell of CSV; nil is a member that the row does not have.
func (h *history) cell(member any) string {
	switch member := member.(type) {
	case string:
		return member
	case *float64:
		if member == nil {
			return pick(h.rng, "", "NaN")
		}
		return fmt.Sprint(*member)
	}
	return ""
}

// modelUpdate is what an entry of PUT /values means.
type modelUpdate struct {
	spot
	runID                         string // or "", for any run
	known                         *int64 // or nil, for any known_time
	setsValue, setsNote, setsTags bool
	value                         *float64
	note                          string   // as it is stored: trimmed, "" for none
	tags                          []string // as they are stored
}

// modelNotes and modelTags are what is sent and what is then stored.
var (
	modelNotes = []struct {
		sent   any
		stored string
	}{{"x", "x"}, {" y ", "y"}, {"  ", ""}, {nil, ""}}
	modelTags = []struct{ sent, stored []string }{
		{[]string{}, nil}, {nil, nil}, {[]string{" B", "a", "A "}, []string{"a", "b"}}, {[]string{"c"}, []string{"c"}}}
)

// update makes a random entry of PUT /values: what is sent and what it means. Now and then it is of
// the same spot as the entry before.
func (h *history) update(before modelUpdate) (sent map[string]any, u modelUpdate) {
	u.spot = pick(h.rng, h.versions...).spot
	if before.valid != 0 && h.chance(25) {
		u.spot = before.spot
	}
	if h.chance(25) {
		u.valid, u.end = h.point()
	}
	if h.chance(5) {
		u.series = pick(h.rng, append([]string{"unknown"}, modelKeys...)...)
	}
	sent = map[string]any{"valid_time": h.when(u.valid)}
	if u.end != 0 {
		sent["valid_time_end"] = h.when(u.end)
	}
	if series, known := h.series[u.series]; known && h.chance(50) {
		sent["series_id"] = series.id
	} else {
		sent["series_key"] = u.series
	}
	h.nameRun(sent, &u)
	for !u.setsValue && !u.setsNote && !u.setsTags {
		u.setsValue, u.setsNote, u.setsTags = h.chance(50), h.chance(50), h.chance(50)
	}
	if u.setsValue {
		u.value = h.value()
		sent["value"] = u.value
	}
	if u.setsNote {
		note := pick(h.rng, modelNotes...)
		sent["annotation"], u.note = note.sent, note.stored
	}
	if u.setsTags {
		tags := pick(h.rng, modelTags...)
		sent["tags"], u.tags = tags.sent, tags.stored
	}
	return sent, u
}

// nameRun has an update name a run, a known_time, both or neither; now and then one that does not exist.
func (h *history) nameRun(sent map[string]any, u *modelUpdate) {
	run := pick(h.rng, h.runs...)
	if h.chance(40) {
		u.runID = run.id
		if h.chance(15) {
			u.runID = nobody
		}
		sent["run_id"] = u.runID
	}
	if h.chance(40) {
		known := pick(h.rng, run.known, run.known, run.known, h.day-6*hour, h.day+1)
		u.known = &known
		sent["known_time"] = h.when(known)
	}
}

// outcome is what an update must lead to: a status of 200, 404, 409 or 422 and, with 200, the version that holds then.
type outcome struct {
	status  int
	version modelVersion
	changed bool // the version is a new one
}

// outcomeOf is what user must be answered to u.
func (h *history) outcomeOf(u modelUpdate, user int) outcome {
	if _, known := h.series[u.series]; !known {
		return outcome{status: 404}
	}
	before, found := h.current(u)
	if !found {
		run, status := h.lastRun(u)
		if status != 200 {
			return outcome{status: status}
		}
		if !u.setsValue || h.hasIntervalOnly(u, run) {
			return outcome{status: 422}
		}
		before = modelVersion{slot: slot{u.spot, run}, number: 1} // the run gains a value
	}
	v := before
	v.old = before.value
	v.batch = len(h.moments)
	if u.setsValue {
		v.value = u.value
	}
	if u.setsNote {
		v.note = u.note
	}
	if u.setsTags {
		v.tags = u.tags
	}
	if found && sameValue(v.value, before.value) && v.note == before.note && slices.Equal(v.tags, before.tags) {
		return outcome{200, v, false}
	}
	v.number++
	v.by = h.email(user)
	return outcome{200, v, true}
}

func sameValue(a, b *float64) bool {
	if a == nil || b == nil {
		return a == b
	}
	return math.Float64bits(*a) == math.Float64bits(*b) // 0.0 and -0.0 are two
}

// matches tells whether u may be about a run.
func (u modelUpdate) matches(run modelRun) bool {
	return (u.runID == "" || run.id == u.runID) && (u.known == nil || run.known == *u.known)
}

// current finds the version that u is about.
func (h *history) current(u modelUpdate) (found modelVersion, ok bool) {
	for _, v := range h.versions {
		if v.spot == u.spot && u.matches(h.runs[v.run]) && h.runs[v.run].gone == 0 && (!ok || h.later(v, found)) {
			found, ok = v, true
		}
	}
	return found, ok
}

// hasIntervalOnly tells whether u is of a moment, where a run, which has no value of it, has an interval.
func (h *history) hasIntervalOnly(u modelUpdate, run int) bool {
	return u.end == 0 && slices.ContainsFunc(h.versions, func(v modelVersion) bool {
		return v.run == run && v.series == u.series && v.valid == u.valid
	})
}

// lastRun is the run that u names, the last one if a known_time names several, and 200; or the status that says that
// there is none, or that it is withdrawn.
func (h *history) lastRun(u modelUpdate) (last, status int) {
	status = 404
	if u.runID == "" && u.known == nil {
		return 0, status
	}
	for i, run := range h.runs {
		switch {
		case !u.matches(run):
		case run.gone == 0:
			last, status = i, 200
		case status == 404:
			status = 409
		}
	}
	return last, status
}

// later tells whether v counts rather than w, of versions of one spot.
func (h *history) later(v, w modelVersion) bool {
	known := cmp.Compare(h.runs[v.run].known, h.runs[w.run].known)
	return cmp.Or(known, cmp.Compare(v.run, w.run), cmp.Compare(v.number, w.number)) > 0
}

// correct sends a random batch of updates.
func (h *history) correct(user int) error {
	var sent []map[string]any
	var outcomes []outcome
	var refusals []int
	var u modelUpdate
	for range 1 + h.rng.Intn(4) {
		var entry map[string]any
		entry, u = h.update(u)
		o := h.outcomeOf(u, user)
		sent = append(sent, entry)
		outcomes = append(outcomes, o)
		if o.status != 200 {
			refusals = append(refusals, o.status)
		}
	}
	text := jsonText(map[string]any{"updates": sent})
	resp, answer, err := h.s.do("PUT", "/values", h.keys[user], text)
	if err != nil {
		return err
	}
	allowed := refusals
	if len(refusals) == 0 {
		allowed = []int{200}
	}
	if !slices.Contains(allowed, resp.StatusCode) {
		return fmt.Errorf("PUT /values %s: status %d, want one of %v: %s", text, resp.StatusCode, allowed, answer)
	}
	if len(refusals) > 0 {
		return nil
	}
	if err := h.written(outcomes, answer); err != nil {
		return fmt.Errorf("PUT /values %s\nanswers %s\n%w", text, answer, err)
	}
	return nil
}

// updateResult is what PUT /values answers for one update.
type updateResult struct {
	Run     string    `json:"run_id"`
	Tenant  string    `json:"tenant_id"`
	Valid   time.Time `json:"valid_time"`
	Series  string    `json:"series_id"`
	ID      *int64    `json:"value_id"`
	Version int       `json:"version"`
}

func (r updateResult) line() string {
	return fmt.Sprintf("%s %s %s %s v%d", r.Run, r.Tenant, iso(r.Valid.UnixMicro()), r.Series, r.Version)
}

// written adds what a batch has written to the model, and compares the answer with it. Of updates of one slot the last
// counts.
func (h *history) written(outcomes []outcome, answer string) error {
	var got struct {
		Updated []updateResult `json:"updated"`
		Skipped []updateResult `json:"skipped_no_ops"`
	}
	if err := json.Unmarshal([]byte(answer), &got); err != nil {
		return err
	}
	if got.Updated == nil || got.Skipped == nil {
		return errors.New("a list is missing")
	}
	last := map[slot]int{}
	for i, o := range outcomes {
		last[o.version.slot] = i
	}
	var updated, skipped []string
	for i, o := range outcomes {
		v := o.version
		if last[v.slot] != i {
			continue
		}
		result := updateResult{Run: h.runs[v.run].id, Tenant: h.tenant, Valid: time.UnixMicro(v.valid),
			Series: h.series[v.series].id, Version: v.number}
		if o.changed {
			h.versions = append(h.versions, v)
			updated = append(updated, result.line())
		} else {
			skipped = append(skipped, result.line())
		}
	}
	var gotUpdated, gotSkipped []string
	for _, r := range got.Updated {
		if r.ID == nil {
			return errors.New("what was updated has no value_id")
		}
		gotUpdated = append(gotUpdated, r.line())
	}
	for _, r := range got.Skipped {
		if r.ID != nil {
			return errors.New("what was skipped has a value_id")
		}
		gotSkipped = append(gotSkipped, r.line())
	}
	if !sameLines(gotUpdated, updated) || !sameLines(gotSkipped, skipped) {
		return fmt.Errorf("want updated %q, skipped %q", updated, skipped)
	}
	return nil
}

// sameLines tells whether a and b, which it sorts, have the same lines in any order.
func sameLines(a, b []string) bool {
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

// question makes a random query.
func (h *history) question() url.Values {
	q := url.Values{}
	if h.chance(40) {
		start := h.day + int64(h.rng.Intn(6))*hour
		q.Set("start_valid", iso(start))
		if h.chance(60) {
			q.Set("end_valid", iso(start+int64(h.rng.Intn(6))*hour))
		}
	}
	if h.chance(20) {
		q.Set("start_known", iso(h.day-int64(h.rng.Intn(4))*6*hour))
	}
	if h.chance(20) {
		q.Set("end_known", iso(h.day+1-int64(h.rng.Intn(3))*6*hour))
		if q.Get("end_known") < q.Get("start_known") {
			q.Del("start_known")
		}
	}
	if h.chance(20) {
		q.Set("lead", pick(h.rng, "1h", "PT6H", "P1D", "PT20H30M", "0s"))
	} else if h.chance(30) {
		q.Set("days_ahead", pick(h.rng, "0", "1", "2"))
		q.Set("time_of_day", pick(h.rng, "00:00", "00:30", "02:15", "12:00", "23:30:00"))
	}
	if h.chance(60) {
		q.Set("tz", pick(h.rng, modelZones...))
	}
	for range h.rng.Intn(3) {
		name := pick(h.rng, modelKeys...)
		if series, known := h.series[name]; known && h.chance(50) {
			q.Add("series_id", series.id)
		} else {
			q.Add("series_key", name)
		}
	}
	h.choose(q)
	if h.chance(30) {
		exact := pick(h.rng, "2h", "PT3H", "24h", "7m")
		q.Set("bucket", pick(h.rng, exact, pick(h.rng, slices.Sorted(maps.Keys(modelUnits))...)))
		q.Set("agg", pick(h.rng, "mean", "min", "max", "sum", "count", "first", "last"))
		return q
	}
	if h.chance(50) {
		q.Set("detail", "true")
	}
	if h.chance(20) {
		q.Set("latest", "true")
		return q
	}
	q.Set("mode", pick(h.rng, "flat", "overlapping"))
	if h.chance(33) {
		q.Set("all_versions", "true")
	}
	return q
}

// choose has a query ask, now and then, for series by patterns, and for some runs and versions.
func (h *history) choose(q url.Values) {
	if h.chance(20) {
		q.Add("match", pick(h.rng, "*", "?", "a*", "*c", "a?c", "?%*", "*_*", "A", `\*`, "**c?", "a_"))
	}
	for h.chance(15) {
		q.Add("run_id", pick(h.rng, h.runs...).id)
	}
	if h.chance(1) {
		q.Add("run_id", nobody)
	}
	for h.chance(15) {
		q.Add("workflow_id", pick(h.rng, "v", "w", "none"))
	}
	if len(h.moments) > 0 && h.chance(15) {
		q.Set("changed_since", pick(h.rng, h.moments...).at)
	}
}

// expect is what the model answers to q as of a moment when it had so many versions. found is false if that is a 404.
func (h *history) expect(q url.Values, versions, moment int) (lines []string, found bool) {
	wanted, found := h.wanted(q, moment)
	if !found {
		return nil, false
	}
	within := h.within(q)
	since := 0 // how many versions there were then
	for _, m := range h.moments {
		if m.at == q.Get("changed_since") {
			since = m.versions
		}
	}
	var shown []modelVersion
	for i, v := range h.versions[:versions] {
		if i >= since && wanted[v.series] && within(v) && !h.withdrawn(v.run, moment) {
			shown = append(shown, v)
		}
	}
	if q.Get("all_versions") != "true" {
		shown = h.latest(shown, q.Get("mode") == "overlapping")
	}
	if q.Has("bucket") {
		return h.buckets(q, shown), true
	}
	if q.Has("latest") {
		shown = lastOfEach(shown)
	}
	for _, v := range shown {
		lines = append(lines, h.rowShown(q, v).line())
	}
	return lines, true
}

// wanted is which series q asks for. found is false if it names one that there was not at that moment.
func (h *history) wanted(q url.Values, moment int) (wanted map[string]bool, found bool) {
	for _, name := range q["series_key"] {
		if _, known := h.series[name]; !known {
			return nil, false
		}
	}
	for _, id := range q["run_id"] {
		named := func(run modelRun) bool { return run.id == id && run.born <= moment }
		if !slices.ContainsFunc(h.runs, named) {
			return nil, false
		}
	}
	all := !q.Has("series_key") && !q.Has("series_id") && !q.Has("match")
	wanted = map[string]bool{}
	for name, series := range h.series {
		named := slices.Contains(q["series_key"], name) || slices.Contains(q["series_id"], series.id)
		if named && series.born > moment {
			return nil, false
		}
		matches := func(pattern string) bool { return matchesRunes([]rune(pattern), []rune(name)) }
		wanted[name] = all || named || slices.ContainsFunc(q["match"], matches)
	}
	return wanted, true
}

// lastOfEach keeps of each series the last value that is not NULL.
func lastOfEach(versions []modelVersion) []modelVersion {
	last := map[string]modelVersion{}
	for _, v := range versions {
		w, found := last[v.series]
		isLater := v.valid > w.valid || v.valid == w.valid && v.end != 0 && (w.end == 0 || v.end > w.end)
		if v.value != nil && (!found || isLater) {
			last[v.series] = v
		}
	}
	return slices.Collect(maps.Values(last))
}

// within returns a function that tells whether a version is within the bounds that q sets.
func (h *history) within(q url.Values) func(modelVersion) bool {
	bound := func(name string, otherwise int64) int64 {
		t, err := time.Parse(time.RFC3339Nano, q.Get(name))
		if err != nil {
			return otherwise
		}
		return t.UnixMicro()
	}
	startValid, endValid := bound("start_valid", math.MinInt64), bound("end_valid", math.MaxInt64)
	startKnown, endKnown := bound("start_known", math.MinInt64), bound("end_known", math.MaxInt64)
	lead := int64(math.MinInt64)
	if q.Has("lead") {
		lead = modelSpans[q.Get("lead")]
	}
	return func(v modelVersion) bool {
		run := h.runs[v.run]
		known := run.known
		if q.Has("run_id") && !slices.Contains(q["run_id"], run.id) ||
			q.Has("workflow_id") && !slices.Contains(q["workflow_id"], run.workflow) {
			return false
		}
		return startValid <= v.valid && v.valid < endValid &&
			startKnown <= known && known < endKnown && v.valid-known >= lead &&
			(!q.Has("days_ahead") || passesGate(q, v.valid, known))
	}
}

// passesGate tells whether a run was known in time for a value. It was, if up to the moment before no clock had shown
// the time at which the gate closes, or a later one.
func passesGate(q url.Values, valid, known int64) bool {
	zone := mustZone(q.Get("tz"))
	daysAhead, err := strconv.Atoi(q.Get("days_ahead"))
	clock, clockErr := time.Parse("15:04:05", (q.Get("time_of_day") + ":00")[:len("15:04:05")])
	if err != nil || clockErr != nil {
		panic(q)
	}
	day := daysSince1970(time.UnixMicro(modelBegin(valid, "P1D", q.Get("tz"))).In(zone))
	closing := time.Date(1970, 1, 1+day-daysAhead, clock.Hour(), clock.Minute(), clock.Second(), 0, time.UTC)
	if known < closing.UnixMicro()-26*hour {
		return true // no clock has shown it yet
	}
	for u := known - 1; u > known-26*hour; u -= minute {
		local := time.UnixMicro(u).In(zone)
		_, offset := local.Zone()
		if !local.UTC().Add(time.Duration(offset) * time.Second).Before(closing) {
			return false
		}
	}
	return true
}

// latest keeps the latest version of each spot or, of overlapping runs, of each slot.
func (h *history) latest(versions []modelVersion, overlapping bool) []modelVersion {
	best := map[slot]modelVersion{}
	for _, v := range versions {
		rivals := v.slot
		if !overlapping {
			rivals.run = 0
		}
		if w, found := best[rivals]; !found || h.later(v, w) {
			best[rivals] = v
		}
	}
	return slices.Collect(maps.Values(best))
}

// rowShown is v as the answer to q has it.
func (h *history) rowShown(q url.Values, v modelVersion) answerRow {
	row := answerRow{Key: v.series, Series: h.series[v.series].id, Valid: time.UnixMicro(v.valid), Value: v.value}
	if v.end != 0 {
		end := time.UnixMicro(v.end)
		row.End = &end
	}
	run := h.runs[v.run]
	detail := q.Get("all_versions") == "true" || q.Get("detail") == "true"
	if detail || q.Get("mode") == "overlapping" {
		known := time.UnixMicro(run.known)
		row.Known = &known
	}
	if detail {
		row.Run, row.Version, row.ChangedBy, row.Tags = run.id, v.number, &v.by, v.tags
		if v.note != "" {
			row.Annotation = &v.note
		}
	}
	return row
}

// buckets aggregates what a flat read shows.
func (h *history) buckets(q url.Values, shown []modelVersion) []string {
	width := modelSpans[q.Get("bucket")]
	_, isCalendar := modelUnits[q.Get("bucket")]
	values := map[spot][]float64{}
	slices.SortFunc(shown, func(v, w modelVersion) int {
		return cmp.Or(cmp.Compare(v.valid, w.valid), cmp.Compare(uint64(v.end), uint64(w.end))) // no end comes first
	})
	for _, v := range shown {
		if v.value != nil {
			bucket := spot{series: v.series}
			if isCalendar {
				bucket.valid = modelBegin(v.valid, q.Get("bucket"), q.Get("tz"))
			} else {
				bucket.valid = v.valid - int64(floorMod(int(v.valid), int(width)))
			}
			values[bucket] = append(values[bucket], *v.value)
		}
	}
	var lines []string
	for bucket, inside := range values {
		value := modelAggregate(q.Get("agg"), inside)
		start := time.UnixMicro(bucket.valid)
		row := answerRow{Key: bucket.series, Series: h.series[bucket.series].id, Valid: start, Value: &value}
		lines = append(lines, row.line())
	}
	return lines
}

// modelAggregate adds up in any order: the model's values are multiples of a half, of which sums are exact.
func modelAggregate(agg string, values []float64) float64 {
	sum := 0.0
	for _, f := range values {
		sum += f
	}
	switch agg {
	case "mean":
		return sum / float64(len(values))
	case "min":
		return slices.Min(values)
	case "max":
		return slices.Max(values)
	case "sum":
		return sum
	case "first":
		return values[0]
	case "last":
		return values[len(values)-1]
	}
	return float64(len(values)) // count
}

// line is all of a row but when it was changed, so that equal rows have equal lines.
func (r answerRow) line() string {
	when := func(t *time.Time) string {
		if t == nil {
			return "-"
		}
		return iso(t.UnixMicro())
	}
	return strings.Join([]string{r.Key, when(&r.Valid), when(r.End), jsonText(r.Value), r.Series, when(r.Known), r.Run,
		strconv.Itoa(r.Version), jsonText(r.ChangedBy), jsonText(r.Annotation), strings.Join(r.Tags, ",")}, " ")
}

// compare asks the server and the model the same, and returns the server's answer.
func (h *history) compare(q url.Values, versions, moment int) (string, error) {
	wanted, found := h.expect(q, versions, moment)
	status := 200
	if !found {
		status = 404
	}
	resp, text, err := h.s.do("GET", "/values?"+q.Encode(), h.keys[0], "")
	if err != nil || resp.StatusCode != status {
		return "", fmt.Errorf("GET /values?%s: %v %v %s, want status %d", q.Encode(), resp, err, text, status)
	}
	if !found {
		return text, nil
	}
	var got readAnswer
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		return "", err
	}
	var lines []string
	for i, row := range got.Data {
		lines = append(lines, row.line())
		if i > 0 && !inOrder(q, got.Data[i-1], row) {
			return "", fmt.Errorf("GET /values?%s: out of order: %s, then %s", q.Encode(), lines[i-1], lines[i])
		}
	}
	if !sameLines(lines, wanted) || got.Count != len(lines) {
		return "", fmt.Errorf("GET /values?%s\nshows %d rows %q\nwant  %d rows %q",
			q.Encode(), got.Count, lines, len(wanted), wanted)
	}
	if len(lines) > 1 && h.chance(25) {
		return text, h.compareLimit(q, text)
	}
	return text, nil
}

// compareLimit reads again with a limit, which must show the first rows of the same.
func (h *history) compareLimit(q url.Values, text string) error {
	var all, part struct {
		Data []json.RawMessage
		More bool
	}
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		return err
	}
	limit := 1 + h.rng.Intn(len(all.Data))
	path := fmt.Sprintf("/values?%s&limit=%d", q.Encode(), limit)
	_, limited, err := h.s.do("GET", path, h.keys[0], "")
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(limited), &part); err != nil {
		return fmt.Errorf("GET %s: %v: %s", path, err, limited)
	}
	same := func(a, b json.RawMessage) bool { return bytes.Equal(a, b) }
	if !slices.EqualFunc(part.Data, all.Data[:limit], same) || all.More || part.More != (limit < len(all.Data)) {
		return fmt.Errorf("GET %s: %s\nwithout limit %s", path, limited, text)
	}
	return nil
}

// feedRow is a row of GET /corrections.
type feedRow struct {
	answerRow
	Old *float64 `json:"old_value"`
}

// feedQuestion makes a random query of the feed, and tells which corrections it asks for.
func (h *history) feedQuestion() (q url.Values, asked func(modelVersion) bool) {
	q = url.Values{}
	within := func(modelVersion) bool { return true }
	if h.chance(30) {
		start := h.day + int64(h.rng.Intn(6))*hour
		q.Set("start_valid", iso(start))
		q.Set("end_valid", iso(start+int64(h.rng.Intn(6))*hour))
		within = h.within(q)
	}
	if h.chance(30) {
		q.Set("tag", pick(h.rng, "a", " B", "c", "d"))
	}
	if h.chance(30) {
		q.Set("changed_by", h.email(h.rng.Intn(2)))
	}
	names := map[string]bool{}
	if h.chance(30) {
		name := pick(h.rng, slices.Collect(maps.Keys(h.series))...)
		names[name] = true
		if h.chance(50) {
			q.Set("series_key", name)
		} else {
			q.Set("series_id", h.series[name].id)
		}
	}
	if h.chance(30) {
		pattern := pick(h.rng, "a", "?", "*", "a?c", "b*", "*x", "B%c")
		q.Set("match", pattern)
		for name := range h.series {
			names[name] = names[name] || matchesRunes([]rune(pattern), []rune(name))
		}
	}
	tag := strings.ToLower(strings.TrimSpace(q.Get("tag")))
	return q, func(v modelVersion) bool {
		return v.number > 1 && within(v) && (tag == "" || slices.Contains(v.tags, tag)) &&
			(!q.Has("changed_by") || v.by == q.Get("changed_by")) && (len(names) == 0 || names[v.series])
	}
}

// compareFeed reads the feed page by page, which must show all corrections that a random query asks for.
func (h *history) compareFeed() error {
	q, asked := h.feedQuestion()
	batches := map[int][]string{} // of one change_time each
	for _, v := range h.versions {
		if asked(v) {
			row := h.rowShown(url.Values{"detail": {"true"}}, v)
			batches[v.batch] = append(batches[v.batch], jsonText(v.old)+" "+row.line())
		}
	}
	newest := slices.Sorted(maps.Keys(batches))
	limit := 1 + h.rng.Intn(4)
	q.Set("limit", strconv.Itoa(limit))
	for more := true; more; {
		var want []string
		for len(want) < limit && len(newest) > 0 {
			want = append(want, batches[newest[len(newest)-1]]...)
			newest = newest[:len(newest)-1]
		}
		more = len(newest) > 0
		resp, text, err := h.s.do("GET", "/corrections?"+q.Encode(), h.keys[0], "")
		if err != nil || resp.StatusCode != 200 {
			return fmt.Errorf("GET /corrections?%s: %v %v %s", q.Encode(), resp, err, text)
		}
		var got struct {
			Data  []feedRow
			Count int
			More  bool
		}
		if err := json.Unmarshal([]byte(text), &got); err != nil {
			return err
		}
		var lines []string
		for i, row := range got.Data {
			lines = append(lines, jsonText(row.Old)+" "+row.line())
			if i > 0 && row.Change > got.Data[i-1].Change {
				return fmt.Errorf("GET /corrections?%s: out of order: %s", q.Encode(), text)
			}
			q.Set("until", row.Change)
		}
		if !sameLines(lines, want) || got.Count != len(lines) || got.More != more {
			return fmt.Errorf("GET /corrections?%s\nshows %d rows %q, more: %v\nwant  %q, more: %v",
				q.Encode(), got.Count, lines, got.More, want, more)
		}
	}
	return nil
}

// inOrder tells whether b may follow a: rows are ordered by series_key, then valid_time (overlapping: known_time, then
// valid_time), then version.
func inOrder(q url.Values, a, b answerRow) bool {
	order := strings.Compare(a.Key, b.Key)
	if q.Get("mode") == "overlapping" {
		order = cmp.Or(order, a.Known.Compare(*b.Known))
	}
	order = cmp.Or(order, a.Valid.Compare(b.Valid))
	if q.Get("all_versions") == "true" {
		order = cmp.Or(order, cmp.Compare(a.Version, b.Version))
	}
	return order <= 0
}

// ---- Plans

// plan is a statement as PostgreSQL ran it, which auto_explain reports.
type plan struct {
	Query string          `json:"Query Text"`
	Root  planNode        `json:"Plan"`
	JIT   json.RawMessage // only if it was compiled
}

type planNode struct {
	Type  string `json:"Node Type"`
	Table string `json:"Relation Name"`
	Index string `json:"Index Name"`
	Rows  int    `json:"Actual Rows"`
	Hit   int    `json:"Shared Hit Blocks"` // of the node and all below it
	Read  int    `json:"Shared Read Blocks"`
	Plans []planNode
}

// shape is the plan without what depends on estimates. A bitmap of one index is like a scan of it.
func (n planNode) shape() string {
	if n.Type == "Bitmap Heap Scan" && len(n.Plans) == 1 && n.Plans[0].Index != "" {
		n.Index = n.Plans[0].Index
		n.Type = "Index Scan"
		n.Plans = nil
	}
	var parts []string
	for _, part := range n.Plans {
		parts = append(parts, part.shape())
	}
	words := strings.Join(strings.Fields(n.Type+" "+n.Table+" "+n.Index), " ")
	return words + "(" + strings.Join(parts, ", ") + ")"
}

// plannedStore is a store of whose statements the plans are kept.
type plannedStore struct {
	*store
	mu    sync.Mutex
	plans []plan
}

// mustPlannedStore opens a store with new connections, which have no plans yet. Its sessions are
// those of any store but for auto_explain, which sends each plan as a notice.
func mustPlannedStore(t *testing.T, dsn string) *plannedStore {
	t.Helper()
	cfg, err := pq.NewConfig(dsn)
	if err != nil {
		t.Fatal("the database's URL cannot be read")
	}
	cfg = sessionConfig(cfg, "public", statementTimeout)
	maps.Copy(cfg.Runtime, map[string]string{
		"session_preload_libraries":     "auto_explain",
		"auto_explain.log_min_duration": "0",
		"auto_explain.log_analyze":      "on",
		"auto_explain.log_buffers":      "on",
		"auto_explain.log_timing":       "off",
		"auto_explain.log_format":       "json",
		"auto_explain.log_level":        "notice",
	})
	connector, err := pq.NewConnectorConfig(cfg)
	if err != nil {
		t.Fatal("the database's URL cannot be used")
	}
	s := &plannedStore{}
	db := sql.OpenDB(pq.ConnectorWithNoticeHandler(connector, func(notice *pq.Error) {
		_, text, isPlan := strings.Cut(notice.Message, "plan:")
		if !isPlan {
			return
		}
		var p plan
		if err := json.Unmarshal([]byte(text), &p); err != nil {
			t.Errorf("a plan cannot be read: %v: %s", err, text)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.plans = append(s.plans, p)
	}))
	t.Cleanup(func() { db.Close() })
	s.store = &store{db: db, schema: "public", places: newShares(totalPlaces, tenantPlaces)}
	return s
}

// cost is how many rows of values_table a read gets, and how many of PostgreSQL's blocks it touches for that.
func (s *plannedStore) cost(t *testing.T, c Caller, change func(*readQuery)) (rows, blocks int) {
	t.Helper()
	for range 2 { // the second time nothing is new to the connection
		s.taken()
		if err := readWith(change)(s, c, 0); err != nil {
			t.Fatal(err)
		}
	}
	root := s.taken()[0].Root
	return root.Rows, root.Hit + root.Read
}

// taken returns the plans since it was called last.
func (s *plannedStore) taken() []plan {
	s.mu.Lock()
	defer s.mu.Unlock()
	plans := s.plans
	s.plans = nil
	return plans
}

// hour1 is an hour of 2025-01-01, as the store has it.
func hour1(n int) timestamp {
	return timestampOf(time.Date(2025, 1, 1, n, 0, 0, 0, time.UTC))
}

// plannedRequest is something that a tenant asks of a store.
type plannedRequest struct {
	name    string
	ofWhole bool // it reads all of the tenant, so its cost grows with the tenant
	ask     func(*plannedStore, Caller, int) error
}

// readWith reads the first of 2025-01-01 with a change to the query.
func readWith(change func(*readQuery)) func(*plannedStore, Caller, int) error {
	return func(s *plannedStore, c Caller, _ int) error {
		q := anyValue
		q.start = hour1(0)
		q.end = hour1(24)
		change(&q)
		return s.Read(context.Background(), c, q, claimOf(c), func(*element) error { return nil })
	}
}

// claimOf is a claim that has room.
func claimOf(c Caller) *claim { return &claim{of: newShares(1<<30, 1<<30), caller: c} }

// uploadTo uploads a day of hourly values of some series.
func uploadTo(s *store, c Caller, known timestamp, keys ...string) error {
	return uploadHours(s, c, known, 0, 24, keys...)
}

// uploadHours uploads so many hourly values of some series, from the first hour on.
func uploadHours(s *store, c Caller, known timestamp, first, hours int, keys ...string) error {
	u := &upload{workflowID: "w", start: hour1(0), known: known, digest: make([]byte, 32)}
	u.createSeries = true
	u.series = map[seriesRef]*seriesRows{}
	for _, key := range keys {
		rows := &seriesRows{}
		for h := range hours {
			rows.points = append(rows.points, point{time: hour1(first + h), value: 1})
		}
		u.series[seriesRef{Key: label(key)}] = rows
	}
	_, err := s.Upload(context.Background(), c, u)
	return err
}

// correctAt gives the series s3 a value at a time, of the run of that known_time unless it is 0.
func correctAt(s *plannedStore, c Caller, at, known timestamp, value int) error {
	given := number(value)
	_, _, err := s.Correct(context.Background(), c, []correction{{
		ref:   seriesRef{Key: "s3"},
		point: point{time: at},
		of:    runName{known: known},
		value: optional[number]{given: true, value: &given},
	}}, claimOf(c))
	return err
}

// listCorrections lists corrections with a change to the query.
func listCorrections(change func(*correctionsQuery)) func(*plannedStore, Caller, int) error {
	return func(s *plannedStore, c Caller, _ int) error {
		q := correctionsQuery{series: []seriesRef{}, since: firstTime, until: lastTime, start: firstTime, end: lastTime}
		change(&q)
		return s.ListCorrections(context.Background(), c, q, func(*element, float64) error { return nil })
	}
}

// plannedRequests are asked with a number that is another each time, and at least 1.
var plannedRequests = []plannedRequest{
	{"read a day by key", false, readWith(func(q *readQuery) {
		q.series = []seriesRef{{Key: "s3"}}
	})},
	{"read a day of each run by key", false, readWith(func(q *readQuery) {
		q.series = []seriesRef{{Key: "s3"}}
		q.overlapping = true
	})},
	{"read a day of all series", true, readWith(func(*readQuery) {})},
	{"read a day of each run of all series", true, readWith(func(q *readQuery) {
		q.overlapping = true
	})},
	{"read a day by a pattern", true, readWith(func(q *readQuery) {
		q.match = []pattern{"s1%", "_3"}
		q.series = []seriesRef{{Key: "s4"}}
	})},
	{"read a day of a run", true, func(s *plannedStore, c Caller, n int) error {
		var run uuid
		err := s.ListRuns(context.Background(), c, runsQuery{startKnown: firstTime, endKnown: lastTime, limit: 1}, func(shown []byte) error {
			return json.Unmarshal(shown, &struct {
				Run *uuid `json:"run_id"`
			}{&run})
		})
		if err != nil {
			return err
		}
		return readWith(func(q *readQuery) {
			q.runs = []uuid{run}
			q.workflows = []label{"w"}
			q.changedSince = firstTime + 1
		})(s, c, n)
	}},
	{"read the latest of a series", false, readWith(func(q *readQuery) {
		q.series = []seriesRef{{Key: "s3"}}
		q.latest = true
	})},
	{"read the latest of all series", true, readWith(func(q *readQuery) {
		q.latest = true
	})},
	{"list the series by a pattern, with what is stored", true, func(s *plannedStore, c Caller, _ int) error {
		return s.ListSeries(context.Background(), c, []pattern{"s%"}, true, func(string, []byte) error { return nil })
	}},
	{"list the runs of a series", false, func(s *plannedStore, c Caller, _ int) error {
		q := runsQuery{series: seriesRef{Key: "s3"}, startKnown: firstTime, endKnown: lastTime, limit: 10}
		return s.ListRuns(context.Background(), c, q, func([]byte) error { return nil })
	}},
	{"list the series", true, func(s *plannedStore, c Caller, _ int) error {
		return s.ListSeries(context.Background(), c, nil, false, func(string, []byte) error { return nil })
	}},
	{"list 10 runs", false, func(s *plannedStore, c Caller, _ int) error {
		q := runsQuery{startKnown: firstTime, endKnown: lastTime, limit: 10}
		return s.ListRuns(context.Background(), c, q, func([]byte) error { return nil })
	}},
	{"upload a few rows", false, func(s *plannedStore, c Caller, n int) error {
		return uploadTo(s.store, c, hour1(24)+timestamp(n), "s4", "s5", fmt.Sprint("new ", n))
	}},
	{"suggest a key", true, func(s *plannedStore, c Caller, _ int) error {
		u := &upload{series: map[seriesRef]*seriesRows{{Key: "s33"}: {}}}
		_, err := s.Upload(context.Background(), c, u)
		if refused, ok := errors.AsType[*refusal](err); !ok || !strings.HasSuffix(refused.message, `did you mean "s3"?`) {
			return fmt.Errorf("it is not suggested but: %w", err)
		}
		return nil
	}},
	{"correct a value", false, func(s *plannedStore, c Caller, n int) error {
		return correctAt(s, c, hour1(5), 0, 100+n)
	}},
	{"correct a value of a run", false, func(s *plannedStore, c Caller, n int) error {
		return correctAt(s, c, hour1(6), hour1(3), 100+n)
	}},
	{"a run gains a value", false, func(s *plannedStore, c Caller, n int) error {
		return correctAt(s, c, hour1(7)+timestamp(n), hour1(0), 1) // of which B has 100,001 runs
	}},
	{"list corrections", false, listCorrections(func(*correctionsQuery) {})},
	{"list corrections of a series", false, listCorrections(func(q *correctionsQuery) {
		q.series = []seriesRef{{Key: "s3"}}
	})},
	{"list corrections of a pattern", false, listCorrections(func(q *correctionsQuery) {
		q.match = []pattern{"s_"}
	})},
	{"withdraw a run", false, func(s *plannedStore, c Caller, n int) error {
		run := fmt.Sprintf("%08x-0000-4000-8000-000000000000", n)
		u := &upload{runID: uuid(run), workflowID: "w", start: hour1(0), digest: make([]byte, 32)}
		if _, err := s.Upload(context.Background(), c, u); err != nil {
			return err
		}
		_, err := s.Withdraw(context.Background(), c, uuid(run), "")
		return err
	}},
	{"look a key up", false, func(s *plannedStore, _ Caller, n int) error {
		digest := sha256.Sum256([]byte(strconv.Itoa(n)))
		_, err := s.LookupKey(context.Background(), digest[:])
		return err
	}},
}

// mustFillTenant gives a tenant 100,000 series with a value each, and as many runs, of which half are withdrawn. The rows are inserted without triggers, which would take most of the time.
func mustFillTenant(t *testing.T, db *sql.DB, tenant string) {
	t.Helper()
	tx, err := db.Begin()
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback()
	for _, query := range []string{
		`INSERT INTO series_table (tenant_id, series_key, unit)
		SELECT $1, 'many ' || i, 'MW' FROM generate_series(1, 100000) AS i`,
		`INSERT INTO runs_table (tenant_id, run_id, workflow_id, run_start_time, known_time,
		       rows_inserted, request_digest)
		SELECT $1, gen_random_uuid(), 'w', '2025-01-01', '2025-01-01', 1, sha256('')
		FROM generate_series(1, 100000)`,
		`INSERT INTO values_table (tenant_id, series_number, run_id, run_order, version, known_time,
		       change_time, valid_from, value)
		SELECT $1, s.series_number, r.run_id, r.run_order, 1, r.known_time, r.inserted_at,
		       '2025-01-01', 1
		FROM series_table s, (SELECT * FROM runs_table WHERE tenant_id = $1 LIMIT 1) AS r
		WHERE s.tenant_id = $1 AND s.series_key LIKE 'many %'`,
		`WITH u AS (
			INSERT INTO users_table (tenant_id, email)
			SELECT $1, i || '@example.com' FROM generate_series(1, 10000) AS i RETURNING *)
		INSERT INTO keys_table (key_id, tenant_id, user_id, name, key_digest, access)
		SELECT email, tenant_id, user_id, 'default', sha256(email::bytea), 'rw' FROM u`,
		`INSERT INTO withdrawals_table (tenant_id, run_id)
		SELECT tenant_id, run_id FROM runs_table r WHERE tenant_id = $1 AND run_id NOT IN (
			SELECT run_id FROM values_table WHERE tenant_id = $1) AND run_order % 2 = 0 ON CONFLICT DO NOTHING`,
	} {
		if _, err := tx.Exec("SET LOCAL session_replication_role = replica"); err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(query, tenant); err != nil {
			t.Fatalf("%s: %v", query, err)
		}
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
}

// Tenant B comes to have 100,000 series. All that this changes for tenant A, and for what B asks of
// a few of its own, is the depth of the indexes.
func TestPlansDoNotDependOnNeighbours(t *testing.T) { // S36
	t.Parallel()
	dsn := mustDatabaseWithTables(t)
	db := mustOpen(t, dsn)
	for _, table := range []string{"runs", "series", "values", "withdrawals", "users"} {
		// The test alone decides when there are statistics.
		mustExec(t, db, "ALTER TABLE "+table+"_table SET (autovacuum_enabled = false)")
	}
	first := mustPlannedStore(t, dsn)
	tenants := []Caller{{tenant: tenantA}, {tenant: tenantB}}
	for _, c := range tenants {
		for run := range 10 {
			keys := []string{"s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9"}
			if err := uploadTo(first.store, c, hour1(run), keys...); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 96 { // so that those of the requests below are not most of the corrections
			if err := correctAt(first, c, hour1(i%24), 0, 50+i); err != nil {
				t.Fatal(err)
			}
		}
	}
	mustExec(t, db, "ANALYZE")

	round := 0
	// ask returns the plans of each of a tenant's requests, which is asked twice. It leaves out
	// those of all series of tenant B: they take long, and may.
	ask := func(s *plannedStore, c Caller) map[string][]plan {
		round++
		plans := map[string][]plan{}
		for _, request := range plannedRequests {
			if request.ofWhole && c.tenant == tenantB {
				continue
			}
			for i := range 2 { // the plans of the second time count
				s.taken()
				if err := request.ask(s, c, 2*round+i); err != nil {
					t.Fatalf("%s: %v", request.name, err)
				}
			}
			plans[request.name] = s.taken()
		}
		return plans
	}
	small := ask(first, tenants[0])
	ask(first, tenants[1])
	mustFillTenant(t, db, tenantB)
	for _, state := range []struct {
		name    string
		analyze bool
		store   *plannedStore
	}{
		{"plans of when there were few series", false, first},
		{"no statistics of the new series", false, mustPlannedStore(t, dsn)},
		{"statistics of the new series", true, mustPlannedStore(t, dsn)},
		{"connections that outlived the statistics", true, first},
	} {
		if state.analyze {
			mustExec(t, db, "ANALYZE")
		}
		for i, who := range []string{"the small tenant", "the large tenant"} {
			plans := ask(state.store, tenants[i])
			for _, request := range plannedRequests {
				got, asked := plans[request.name]
				if !asked {
					continue
				}
				t.Run(state.name+"/"+who+"/"+request.name, func(t *testing.T) {
					comparePlans(t, request, got, small[request.name])
				})
			}
		}
	}
}

// comparePlans compares the plans of a request with those among few series.
func comparePlans(t *testing.T, request plannedRequest, got, want []plan) {
	t.Helper()
	if len(got) != len(want) || len(want) == 0 {
		t.Fatalf("%d statements, want %d", len(got), len(want))
	}
	for i, p := range got {
		shape := p.Root.shape()
		if !request.ofWhole && shape != want[i].Root.shape() {
			t.Errorf("the plan is %s\nbefore it was %s\nof %s",
				shape, want[i].Root.shape(), p.Query)
		}
		// Deeper indexes cost some blocks with each look-up. The rows of 100,000 series fill 1,000.
		blocks := p.Root.Hit + p.Root.Read
		before := want[i].Root.Hit + want[i].Root.Read
		if blocks > 3*before+30 {
			t.Errorf("touches %d blocks, before it was %d: %s\nof %s",
				blocks, before, shape, p.Query)
		}
		if p.JIT != nil {
			t.Errorf("PostgreSQL compiled %s", p.Query)
		}
		for _, word := range []string{"Seq Scan", "Gather"} {
			if strings.Contains(shape, word) {
				t.Errorf("the plan has a %s: %s\nof %s", word, shape, p.Query)
			}
		}
	}
}

// What a read has to hold of runs that overlap is counted.
func TestMergeOfARunsVersionsIsCounted(t *testing.T) { // S34
	t.Parallel()
	dsn := mustDatabaseWithTables(t)
	s := mustPlannedStore(t, dsn)
	c := Caller{tenant: tenantA}
	for run := range 2 * claimStep / (24 * elementBytes) {
		if err := uploadTo(s.store, c, hour1(run), "s3"); err != nil {
			t.Fatal(err)
		}
	}
	q := anyValue
	q.allVersions = true
	memory := &claim{of: newShares(claimStep, claimStep), caller: c}
	err := s.Read(context.Background(), c, q, memory, func(*element) error { return nil })
	refused, ok := errors.AsType[*refusal](err)
	if !ok || refused.kind != tooLarge {
		t.Errorf("a read of more than its tenant may hold: %v, want %v", err, tooLarge)
	}
}

// ---- Merging

// mergeCase is some blocks in the order in which they are added.
type mergeCase struct {
	merger
	blocks [][]element
}

// randomMerge makes runs that overlap at a few times, cut into blocks, and corrections of theirs.
func randomMerge(rng *rand.Rand) mergeCase {
	var c mergeCase
	switch rng.Intn(3) {
	case 1:
		c.everyRun = true
	case 2:
		c.keepAll = true
	}
	for order := range 1 + rng.Intn(8) {
		run := version{Known: timestamp(1 + rng.Intn(3)), Order: int64(order), Number: 1}
		var points []point
		for time := range timestamp(1 + rng.Intn(30)) {
			for end := range timestamp(3) {
				if rng.Intn(3) == 0 {
					points = append(points, point{1 + time, end, rng.Float64()})
				}
			}
		}
		for rest := points; len(rest) > 0; {
			n := 1 + rng.Intn(len(rest))
			c.add(run, rest[:n]...)
			rest = rest[n:]
		}
		for range min(len(points), rng.Intn(6)) {
			run.Number++ // of one point a run may have versions 1, 2 and 5, say
			corrected := points[rng.Intn(len(points))]
			corrected.value = rng.Float64()
			c.add(run, corrected)
		}
	}
	rng.Shuffle(len(c.blocks), func(i, j int) {
		c.blocks[i], c.blocks[j] = c.blocks[j], c.blocks[i]
	})
	slices.SortStableFunc(c.blocks, func(a, b []element) int {
		return cmp.Compare(a[0].time, b[0].time)
	})
	return c
}

// add appends a block of a version.
func (c *mergeCase) add(v version, points ...point) {
	var block []element
	for _, p := range points {
		block = append(block, element{p, &v})
	}
	c.blocks = append(c.blocks, block)
}

// merged is what the merger makes of the blocks.
func (c *mergeCase) merged() (emitted []element) {
	emit := func(e *element) error {
		emitted = append(emitted, *e)
		return nil
	}
	for _, block := range c.blocks {
		c.flush(block[0].time, emit)
		c.merger.add(block)
	}
	c.flush(lastTime, emit)
	return emitted
}

// rank is where an element stands: what decides first comes first.
type rank [5]int64

// expected is what the merger should make of the blocks: of the elements that replace each other
// the greatest, and those in order.
func (c *mergeCase) expected() []element {
	best := map[rank]element{}
	strength := func(e element) []int64 {
		return []int64{int64(e.from.Known), e.from.Order, int64(e.from.Number)}
	}
	for _, e := range slices.Concat(c.blocks...) {
		number, known := int64(e.from.Number), int64(e.from.Known)
		place := rank{int64(e.time), int64(e.end)}
		if c.everyRun {
			place = rank{int64(e.time), int64(e.end), e.from.Order}
		}
		if c.keepAll {
			place = rank{int64(e.time), number, int64(e.end), known, e.from.Order}
		}
		other, found := best[place]
		if !found || slices.Compare(strength(e), strength(other)) > 0 {
			best[place] = e
		}
	}
	var elements []element
	places := slices.SortedFunc(maps.Keys(best), func(a, b rank) int {
		return slices.Compare(a[:], b[:])
	})
	for _, place := range places {
		elements = append(elements, best[place])
	}
	return elements
}

func TestMergerAgreesWithNaiveModel(t *testing.T) { // S37
	t.Parallel()
	for range 3000 {
		seed := rand.Int63()
		c := randomMerge(rand.New(rand.NewSource(seed)))
		got, want := c.merged(), c.expected()
		if !slices.Equal(got, want) {
			t.Fatalf("seed %d: everyRun %v, keepAll %v: %d elements, want %d: %v, want %v",
				seed, c.everyRun, c.keepAll, len(got), len(want), got, want)
		}
	}
}

// oneStart has so many runs of 480 values, which share the first time and no other.
func oneStart(runs int) *mergeCase {
	c := &mergeCase{}
	for run := range runs {
		points := []point{{time: firstTime}}
		for i := 1; i < 480; i++ {
			points = append(points, point{time: firstTime + timestamp(i*runs+run)})
		}
		c.add(version{Known: firstTime, Order: int64(run), Number: 1}, points...)
	}
	return c
}

// mergedElements is how many elements are written into lists to merge so many runs that begin at
// one time. To merge is to write a new list, so the memory that is allocated tells.
func mergedElements(runs int) uint64 {
	c := oneStart(runs)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for _, block := range c.blocks {
		c.flush(firstTime, nil)
		c.merger.add(block)
	}
	c.flush(lastTime, func(*element) error { return nil })
	runtime.ReadMemStats(&after)
	return (after.TotalAlloc - before.TotalAlloc) / uint64(elementBytes)
}

// It is not parallel to other tests, which would allocate memory too.
func TestMergingFourTimesTheRunsCostsAtMostFiveTimes(t *testing.T) { // S37
	few, many := mergedElements(500), mergedElements(2000)
	if many > 5*few {
		t.Errorf("2,000 runs write %d elements, 500 runs %d: %.1f times as many",
			many, few, float64(many)/float64(few))
	}
}

func BenchmarkMergeOneStart(b *testing.B) {
	for _, runs := range []int{250, 1000, 2000} {
		b.Run(strconv.Itoa(runs), func(b *testing.B) {
			c := oneStart(runs)
			b.ReportAllocs()
			for b.Loop() {
				c.merged()
			}
			b.ReportMetric(float64(480*runs*b.N)/b.Elapsed().Seconds(), "values/s")
		})
	}
}

// ---- Corrections

// correctionAt is an entry of PUT /values on an hour of 2025-01-01, with these members.
func correctionAt(hh, members string) string {
	return `{"valid_time":"2025-01-01T` + hh + `:00:00Z",` + members + `}`
}

// corrections is a body of PUT /values with these entries.
func corrections(entries ...string) string { return `{"updates":[` + strings.Join(entries, ",") + `]}` }

// update is a body of PUT /values with one entry on load at midnight, with these members.
func update(members string) string {
	return corrections(correctionAt("00", `"series_key":"load",`+members))
}

func TestCorrectionKeepsWhatIsAbsentAndClearsWhatIsNull(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	second := s.mustUser(t, tenantA, "b@example.com")
	s.must(t, 200, "POST", "/upload", key, oneValue)
	version := 1
	holds := `[1,null,null]` // value, annotation, tags
	cases := []struct{ name, members, want string }{
		// An empty want means that the correction changes nothing.
		{"an annotation is trimmed", `"annotation":"  checked by hand  "`, `[1,"checked by hand",null]`},
		{"the same value", `"value":1`, ""},
		{"the same annotation and value", `"annotation":"checked by hand","value":1.0`, ""},
		{"tags are sorted, in lower case, each once", `"tags":["b"," A ","a","B"]`, `[1,"checked by hand",["a","b"]]`},
		{"the same tags written otherwise", `"tags":["A","b"]`, ""},
		{"a value alone", `"value":2.5`, `[2.5,"checked by hand",["a","b"]]`},
		{"a value of null", `"value":null`, `[null,"checked by hand",["a","b"]]`},
		{"the same null and tags", `"value":null,"tags":["b","a"]`, ""},
		{"an annotation of null", `"annotation":null`, `[null,null,["a","b"]]`},
		{"a blank annotation where there is none", `"annotation":" \n"`, ""},
		{"tags of null", `"tags":null`, `[null,null,null]`},
		{"an empty list of tags where there are none", `"tags":[]`, ""},
		{"all three", `"value":-3,"annotation":"x","tags":["ü"]`, `[-3,"x",["ü"]]`},
		{"an empty annotation and list of tags", `"annotation":"","value":0,"tags":[]`, `[0,null,null]`},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			changes := c.want != ""
			if changes {
				version++
				holds = c.want
			}
			answer := s.must(t, 200, "PUT", "/values", second, update(c.members))
			if updated := strings.Count(answer, `"value_id"`) == 1; updated != changes {
				t.Errorf("%s is answered %s; updated: %v, want %v", c.members, answer, updated, changes)
			}
			if skipped := !strings.Contains(answer, `"skipped_no_ops":[]`); skipped == changes {
				t.Errorf("%s is answered %s; skipped: %v, want %v", c.members, answer, skipped, !changes)
			}
			if !strings.Contains(answer, fmt.Sprintf(`"version":%d`, version)) || !strings.Contains(answer, tenantA) {
				t.Errorf("%s is answered %s, want version %d of %s", c.members, answer, version, tenantA)
			}
			got := s.mustRead(t, "/values?detail=true", key)[0]
			text := jsonText([]any{got.Value, got.Annotation, got.Tags})
			if text != holds || *got.ChangedBy != "b@example.com" || got.Version != version {
				t.Errorf("%s leads to %s version %d by %s, want %s version %d",
					c.members, text, got.Version, *got.ChangedBy, holds, version)
			}
		})
	}
	all := mustDecode[readAnswer](t, s.must(t, 200, "GET", "/values?all_versions=true", key, ""))
	if all.Count != version || *all.Data[0].ChangedBy != "a@example.com" || *all.Data[0].Value != 1 {
		t.Errorf("the history has %d versions, want %d, and begins with %s", all.Count, version, all.Data[0].line())
	}
	current := mustQuery(t, s.db, `SELECT concat_ws(' ', count(*), min(value), min(version)) FROM current_values`)
	if want := fmt.Sprint("1 0 ", version); current != want {
		t.Errorf("the view current_values shows %q, want %q", current, want)
	}
}

// 0.0 and -0.0 are two numbers: a value comes back with the sign that it was sent with.
func TestCorrectionKeepsTheSignOfZero(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	rows := []string{at("2025-01-01", "0.0"), at("2025-01-02", "-0.0")}
	s.must(t, 200, "POST", "/upload", key, runWith("", rows...))
	for _, c := range []struct {
		name, validTime, value string
		changes                bool
		want                   string
	}{
		{"0.0 to 0", "2025-01-01", "0", false, "0.0"},
		{"0.0 to -0.0", "2025-01-01", "-0.0", true, "-0.0"},
		{"-0.0 to -0", "2025-01-01", "-0", false, "-0.0"},
		{"-0.0 to 0.0", "2025-01-01", "0.0", true, "0.0"},
		{"0.0 to what is too small for a float64", "2025-01-01", "-1e-999", true, "-0.0"},
		{"-0.0 to null", "2025-01-01", "null", true, "null"},
		{"null to -0.0", "2025-01-01", "-0.0", true, "-0.0"},
		{"-0.0 as it was uploaded", "2025-01-02", "-0.0", false, "-0.0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			body := corrections(fmt.Sprintf(`{"series_key":"load","valid_time":%q,"value":%s}`,
				c.validTime, c.value))
			text := s.must(t, 200, "PUT", "/values", key, body)
			if changed := strings.Contains(text, "value_id"); changed != c.changes {
				t.Errorf("PUT /values %s: %s, changed: %v, want %v", body, text, changed, c.changes)
			}
			path := "/values?start_valid=" + c.validTime + "T00:00:00Z&limit=1"
			text = s.must(t, 200, "GET", path, key, "")
			expectIn(t, "GET "+path, text, `"value":`+c.want)
		})
	}
}

// mustRuns is the ids of all runs, in the order of insertion.
func mustRuns(t *testing.T, s *testServer) []string {
	t.Helper()
	const query = `SELECT string_agg(run_id::text, ' ' ORDER BY inserted_at) FROM runs_table`
	return strings.Fields(mustQuery(t, s.db, query))
}

func TestCorrectionFindsTheValueThatItNames(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, series := mustPicture(t, s)
	runs := mustRuns(t, s)
	for _, c := range []struct {
		name, body string
		want       []string
	}{
		{"of the latest run that has it", corrections(correctionAt("01", `"series_key":"load","value":7`)),
			[]string{runs[1], `"version":2`}},
		{"of a run that is named", corrections(
			correctionAt("01", `"series_key":"load","value":8,"run_id":"`+strings.ToUpper(runs[0])+`"`)),
			[]string{runs[0], `"version":2`}},
		{"of a known_time, by the series' id", corrections(
			correctionAt("01", `"series_id":"`+series["load"]+`","value":9,"known_time":"2024-12-31 01:00+01:00"`)),
			[]string{runs[0], `"version":3`}},
		{"of an interval", corrections(
			correctionAt("00", `"valid_time_end":"2025-01-01T02:00:00Z","series_key":"price","value":21`)),
			[]string{`"version":2`}},
		{"a run gains a value", corrections(
			correctionAt("01", `"series_key":"wind","run_id":"`+runs[0]+`","value":6,"annotation":"late"`)),
			[]string{`"version":2`}},
		{"a run gains a null", corrections(correctionAt("01", `"series_key":"wind","run_id":"`+runs[1]+`","value":null`)),
			[]string{`"version":2`}},
		{"the last of two of one value counts", corrections(correctionAt("01", `"series_key":"load","value":1`),
			correctionAt("01", `"series_key":"load","value":2`)), []string{`"version":3`}},
		{"no updates", corrections(), []string{`"updated":[]`, `"skipped_no_ops":[]`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := s.must(t, 200, "PUT", "/values", key, c.body)
			for _, want := range c.want {
				if !strings.Contains(text, want) {
					t.Errorf("PUT /values %s: %s, want %s in it", c.body, text, want)
				}
			}
		})
	}
	const want = "00/load 00=1 v1, 00/load 01=9 v3, 00/load 02=null v1, " +
		"12/load 01=2 v3, 12/load 02=3.75 v2, 12/load 03=4.5 v1, 12/load 03=9 v1, " +
		"12/price 00-01=10 v1, 12/price 00-02=21 v2, " +
		"00/wind 00=0.5 v1, 00/wind 01=6 v2, 12/wind 01=null v2"
	if got := brief(t, s.must(t, 200, "GET", "/values?mode=overlapping&detail=true", key, "")); got != want {
		t.Errorf("after the corrections\nit is %s\nwant  %s", got, want)
	}
}

// An entry that is refused takes the good entry before it along.
func TestRefusedCorrectionStoresNothing(t *testing.T) { // S22
	t.Parallel()
	s := mustServer(t)
	key, series := mustPicture(t, s)
	runs := mustRuns(t, s)
	load := func(members string) string { return correctionAt("01", `"series_key":"load",`+members) }
	good := load(`"value":55`)
	manyTags := `["x"` + strings.Repeat(`,"x"`, maxTags) + `]`
	const isNone = "updates[1]" // the entry is named
	before := s.stored(t)
	for _, c := range []struct {
		name, entry string
		status      int
		want        string
	}{
		{"a time without a value", `{"valid_time":"2025-01-05","series_key":"load","value":1}`, 404, isNone},
		{"an unknown series_key", correctionAt("01", `"series_key":"nope","value":1`), 404, "series_key"},
		{"an unknown series_id", correctionAt("01", `"series_id":"`+nobody+`","value":1`), 404, "series_id"},
		{"an end that the value has not", load(`"valid_time_end":"2025-01-01T02:00:00Z","value":1`), 404, isNone},
		{"an interval without its end", correctionAt("00", `"series_key":"price","value":1`), 404, isNone},
		{"an unknown run", load(`"run_id":"` + nobody + `","value":1`), 404, isNone},
		{"a known_time of no run", load(`"known_time":"2024-01-01","value":1`), 404, isNone},
		{"a run with the known_time of another",
			load(`"run_id":"` + runs[0] + `","known_time":"2024-12-31T12:00:00Z","value":1`), 404, isNone},
		{"a moment where the run has an interval",
			correctionAt("00", `"series_key":"price","run_id":"`+runs[1]+`","value":1`), 422, "valid_time_end"},
		{"a moment where the run of that known_time has an interval",
			correctionAt("00", `"series_key":"price","known_time":"2024-12-31T12:00:00Z","run_id":"`+runs[1]+
				`","value":1`), 422, "valid_time_end"},
		{"a new value of a run without a value",
			correctionAt("01", `"series_key":"price","run_id":"`+runs[0]+`","annotation":"x"`), 422, "value"},
		{"nothing to change", correctionAt("01", `"series_key":"load"`), 422, isNone},
		{"no series", correctionAt("01", `"value":1`), 422, "series"},
		{"no valid_time", `{"series_key":"load","value":1}`, 422, "valid_time"},
		{"a valid_time that is no time", `{"valid_time":"soon","series_key":"load","value":1}`, 422, "valid_time"},
		{"a text as value", load(`"value":"1"`), 422, "value"},
		{"a value beyond float64", load(`"value":1e999`), 422, "value"},
		{"a bare NaN", load(`"value":NaN`), 422, isNone},
		{"an unknown member", load(`"value":1,"extra":1`), 422, "extra"},
		{"a member twice", load(`"value":1,"value":2`), 422, "value: given twice"},
		{"a member in upper case", load(`"Value":1`), 422, "Value"},
		{"a text as tags", load(`"tags":"x"`), 422, "tags: expected list of texts"},
		{"a number as tag", load(`"tags":[5]`), 422, "tags"},
		{"null as tag", load(`"tags":[null,"x"]`), 422, "tags"},
		{"too many tags", load(`"tags":` + manyTags), 422, "tags"},
		{"a NUL in a tag", load(`"tags":["a\u0000"]`), 422, "tags"},
		{"a number as annotation", load(`"annotation":5`), 422, "annotation"},
		{"a NUL in the annotation", load(`"annotation":"\u0000"`), 422, "annotation"},
		{"a run_id that is no UUID", load(`"run_id":"x","value":1`), 422, "run_id"},
		{"a key and the id of another series",
			correctionAt("01", `"series_key":"wind","series_id":"`+series["load"]+`","value":1`), 422, "wind"},
		{"an end before the beginning", load(`"valid_time_end":"2025-01-01","value":1`), 422, "valid_time_end"},
		{"a known_time that is no time", load(`"known_time":"x","value":1`), 422, "known_time"},
		{"another tenant's id", load(`"tenant_id":"` + tenantB + `","value":1`), 403, "tenant_id"},
		{"a number as entry", `5`, 422, isNone},
		{"null as entry", `null`, 422, isNone},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := s.must(t, c.status, "PUT", "/values", key, corrections(good, c.entry))
			if !strings.Contains(text, c.want) {
				t.Errorf("%s: %s, want %s in it", c.entry, text, c.want)
			}
			if s.stored(t) != before {
				t.Fatalf("%s: refused, and yet something was stored", c.entry)
			}
		})
	}
	s.runRequests(t, key, []requestCase{
		{"half an object", "PUT", "/values", `{`, 422, []string{"body"}},
		{"a list as body", "PUT", "/values", `[]`, 422, []string{"body"}},
		{"an object as updates", "PUT", "/values", `{"updates":{}}`, 422, []string{"updates"}},
		{"an unknown member of the body", "PUT", "/values", `{"updates":[],"x":1}`, 422, []string{"x"}},
		{"updates twice", "PUT", "/values", `{"updates":[],"updates":[]}`, 422, []string{"updates"}},
		{"updates in upper case", "PUT", "/values", `{"Updates":[]}`, 422, []string{"Updates"}},
		{"an unknown parameter", "PUT", "/values?x=1", `{"updates":[]}`, 422, []string{"x"}},
	})
	t.Run("CSV", func(t *testing.T) {
		s.must(t, 415, "PUT", "/values", key, "a,b", "Content-Type: text/csv")
	})
}

func TestManyCorrectionsAreOneRequest(t *testing.T) { // S23
	t.Parallel()
	s, key := mustTenant(t)
	const n = 3000
	mustManyValues(t, s, key, n)
	validTime := func(i int) time.Time { return time.Date(2020, 1, 1, 0, i, 0, 0, time.UTC) }
	var entries []string
	for i := range n {
		entries = append(entries, fmt.Sprintf(`{"series_key":"load","valid_time":%q,"value":%d.5}`,
			validTime(i).Format(time.RFC3339), i))
	}
	got := mustDecode[struct {
		Updated []struct {
			ID      int64     `json:"value_id"`
			Valid   time.Time `json:"valid_time"`
			Version int
		}
	}](t, s.must(t, 200, "PUT", "/values", key, corrections(entries...)))
	ids := map[int64]bool{}
	for i, u := range got.Updated {
		ids[u.ID] = true
		if u.Version != 2 || !u.Valid.Equal(validTime(i)) {
			t.Fatalf("updated[%d] is %+v", i, u)
		}
		if i%500 != 0 {
			continue // a look at some is enough
		}
		isItsRow := mustQuery(t, s.db, `SELECT valid_from = $2 FROM values_table WHERE value_id = $1`, u.ID, u.Valid)
		if isItsRow != "true" {
			t.Errorf("value_id of updated[%d] is another row's", i)
		}
	}
	if len(ids) != n {
		t.Errorf("%d value_ids, want %d", len(ids), n)
	}
	for i, row := range s.mustRead(t, "/values", key) {
		if *row.Value != float64(i)+0.5 {
			t.Fatalf("after the corrections row %d is %v", i, *row.Value)
		}
	}
}

// A correction waits for PostgreSQL most of its time.
func TestOneSeriesByKeyIsCorrectedInThreeStatements(t *testing.T) {
	t.Parallel()
	s := mustPlannedStore(t, mustDatabaseWithTables(t))
	c := Caller{tenant: tenantA}
	if err := uploadTo(s.store, c, hour1(0), "s3"); err != nil {
		t.Fatal(err)
	}
	s.taken()
	if err := correctAt(s, c, hour1(5), 0, 7); err != nil {
		t.Fatal(err)
	}
	if n := len(s.taken()); n != 3 { // for the lock, what is stored, and the new row
		t.Errorf("a correction took %d statements", n)
	}
}

func TestConcurrentCorrectionsOfOneValueAreAllKept(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	s.must(t, 200, "POST", "/upload", key, oneValue)
	together(8, func(i int) {
		text := s.expectOK(t, "PUT", "/values", key, update(fmt.Sprintf(`"value":%d`, 100+i)))
		if !strings.Contains(text, "value_id") {
			t.Errorf("the correction to %d is answered %s", 100+i, text)
		}
	})
	const versions = `SELECT string_agg(version::text, ' ' ORDER BY version) FROM values_table`
	if got := mustQuery(t, s.db, versions); got != "1 2 3 4 5 6 7 8 9" {
		t.Errorf("the versions are %s", got)
	}
	together(2, func(i int) {
		s.expectOK(t, "PUT", "/values", key, update(fmt.Sprintf(`"tags":["t%d"]`, i)))
	})
	if got := mustQuery(t, s.db, versions+` WHERE tags IS NOT NULL`); got != "10 11" {
		t.Errorf("two at once made the versions %s", got)
	}
}

// ---- Withdrawals

// withdraw is the path by which a run is withdrawn.
func withdraw(run string) string { return "/runs/" + run + "/withdraw" }

// Locks have corrections wait for each other. Where these fail, an index keeps two from having one version.
func TestTwoCorrectionsNeverHaveOneVersion(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	s.must(t, 200, "POST", "/upload", key, oneValue)
	s.db.SetMaxOpenConns(2)
	other, err := s.db.Begin() // a correction that has no lock
	if err != nil {
		t.Fatal(err)
	}
	defer other.Rollback()
	_, err = other.Exec(`INSERT INTO values_table (tenant_id, series_number, run_id, run_order, version, known_time, change_time,
			valid_from, valid_to, valid_times, valid_time_ends, "values")
		SELECT tenant_id, series_number, run_id, run_order, 2, known_time, clock_timestamp(), valid_from, valid_to, valid_times,
			valid_time_ends, "values" FROM values_table`)
	if err != nil {
		t.Fatal(err)
	}
	const body = `{"updates":[{"series_key":"load","valid_time":"2025-01-01","value":5}]}`
	answered := make(chan int)
	go func() {
		resp, _, err := s.do("PUT", "/values", key, body)
		if err != nil || resp.Header.Get("Retry-After") == "" {
			t.Errorf("%v, or no Retry-After", err)
			answered <- 0
			return
		}
		answered <- resp.StatusCode
	}()
	waitUntil(t, "it waits for the other", func() bool {
		return mustQuery(t, s.db, `SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
			WHERE NOT l.granted AND a.datname = current_database()`) != "0"
	})
	if err := other.Commit(); err != nil {
		t.Fatal(err)
	}
	if status := <-answered; status != 503 {
		t.Errorf("the second is answered with %d", status)
	}
	s.must(t, 200, "PUT", "/values", key, body)
	versions := mustQuery(t, s.db, `SELECT string_agg(version::text, ' ' ORDER BY version) FROM values_table`)
	if versions != "1 2 3" {
		t.Errorf("the versions are %s", versions)
	}
}

func TestWithdrawnRunIsNotShownAndStaysAsOfBefore(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, _ := mustPicture(t, s)
	runs := mustRuns(t, s)
	reads := []struct{ name, query, want string }{
		{"flat", "mode=flat", "load 00=1, load 01=2, load 02=null, load 03=9, wind 00=0.5"},
		{"overlapping", "mode=overlapping&series_key=load", "00/load 00=1, 00/load 01=2, 00/load 02=null, 12/load 03=9"},
		{"all versions", "all_versions=true&series_key=load&start_valid=2025-01-01T02:00:00Z",
			"00/load 02=null v1, 12/load 03=9 v1"},
		{"a sum", "bucket=P1D&agg=sum", "load 00=12, wind 00=0.5"},
		{"one series by key", "series_key=price", ""},
		{"all versions of all runs", "all_versions=true&mode=overlapping",
			"00/load 00=1 v1, 00/load 01=2 v1, 00/load 02=null v1, 12/load 03=9 v1, 00/wind 00=0.5 v1"},
	}
	read := func(query string) string {
		t.Helper()
		return s.must(t, 200, "GET", "/values?"+query, key, "")
	}
	before := map[string]string{}
	for _, c := range reads {
		before[c.name] = read(c.query)
	}
	moment := url.QueryEscape(mustQuery(t, s.db, `SELECT iso_time(clock_timestamp())`))
	stored := s.stored(t)
	answer := s.must(t, 200, "POST", withdraw(runs[1]), key, `{"annotation":" wrong unit "}`)
	expectIn(t, "withdrawal", answer, `{"run_id":"`+runs[1]+`"`, `"withdrawn_by":"a@example.com"`,
		`"annotation":"wrong unit"`)
	for _, c := range reads {
		t.Run(c.name, func(t *testing.T) {
			if got := brief(t, read(c.query)); got != c.want {
				t.Errorf("GET /values?%s\nshows %s\nwant  %s", c.query, got, c.want)
			}
			if got := read(c.query + "&as_of=" + moment); got != before[c.name] {
				t.Errorf("as of before GET /values?%s\nshows %s\nwant  %s", c.query, got, before[c.name])
			}
			if got := brief(t, read(c.query+"&as_of=2100-01-01")); got != c.want {
				t.Errorf("as of a time to come GET /values?%s\nshows %s\nwant  %s", c.query, got, c.want)
			}
		})
	}
	if s.stored(t) != stored {
		t.Error("the withdrawal changed what is stored")
	}
	const current = `SELECT string_agg(series_key || value, ' ' ORDER BY series_key, valid_time) FROM current_values`
	if got := mustQuery(t, s.db, current); got != "load1 load2 load9 wind0.5" {
		t.Errorf("the view current_values shows %s", got)
	}
	t.Run("the list of runs", func(t *testing.T) {
		withdrawn := mustDecode[jsonObject](t, answer)
		list := mustDecode[struct{ Data []jsonObject }](t, s.must(t, 200, "GET", "/runs", key, ""))
		if len(list.Data) != 3 {
			t.Fatalf("%d runs are listed, want 3", len(list.Data))
		}
		for _, run := range list.Data {
			for _, name := range []string{"withdrawn_at", "withdrawn_by", "annotation"} {
				member, given := run[name]
				if given != (run["run_id"] == runs[1]) || given && member != withdrawn[name] {
					t.Errorf("%s of run %s is %v", name, run["run_id"], member)
				}
			}
		}
	})
	t.Run("again", func(t *testing.T) {
		for _, body := range []string{"", `{"annotation":"another"}`} {
			if again := s.must(t, 200, "POST", withdraw(runs[1]), key, body); again != answer {
				t.Errorf("again it answers %s, first %s", again, answer)
			}
		}
	})
	t.Run("corrections made of it before are listed", func(t *testing.T) {
		expectIn(t, "corrections", s.must(t, 200, "GET", "/corrections", key, ""), runs[1], `"count":1`)
	})
	t.Run("a value of another run is corrected now", func(t *testing.T) {
		text := s.must(t, 200, "PUT", "/values", key, corrections(correctionAt("01", `"series_key":"load","value":7`)))
		expectIn(t, "PUT /values", text, runs[0], `"version":2`)
	})
}

func TestWithdrawalIsRefused(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	run := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", key, oneValue)).RunID
	path := withdraw(run)
	s.runRequests(t, key, []requestCase{
		{"of no run", "POST", withdraw(nobody), "", 404, []string{"run_id", nobody}},
		{"of what is no UUID", "POST", withdraw("nope"), "", 422, []string{"run_id", "UUID"}},
		{"of a UUID with a letter too many", "POST", withdraw(run + "a"), "", 422, []string{"run_id"}},
		{"of a UUID with a slash", "POST", withdraw(run + "%2Fwithdraw"), "", 422, []string{"run_id"}},
		{"of nothing", "POST", "/runs//withdraw", "", 404, nil},
		{"by another method", "PUT", path, "{}", 405, []string{"POST"}},
		{"with an unknown member", "POST", path, `{"reason":"x"}`, 422, []string{"reason"}},
		{"with a number as annotation", "POST", path, `{"annotation":5}`, 422, []string{"annotation"}},
		{"with a long annotation", "POST", path, `{"annotation":"` + strings.Repeat("x", maxProse+1) + `"}`, 422,
			[]string{"annotation"}},
		{"with a member twice", "POST", path, `{"annotation":"x","annotation":"y"}`, 422, []string{"annotation"}},
		{"with a list", "POST", path, `[]`, 422, []string{"body"}},
		{"with a parameter", "POST", path + "?x=1", "", 422, []string{"x"}},
		{"of another tenant's", "POST", path + "?tenant_id=" + tenantB, "", 403, []string{"tenant_id"}},
	})
	if got := mustQuery(t, s.db, `SELECT count(*) FROM withdrawals_table`); got != "0" {
		t.Errorf("a refused withdrawal was stored: %s rows", got)
	}
	s.must(t, 200, "POST", path, key, `{}`)
}

func TestUploadRepeatedAfterItsWithdrawalStaysWithdrawn(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	body := runWith(`"run_id":"`+nobody+`",`, at("2025-01-01", "1"))
	first := s.must(t, 200, "POST", "/upload", key, body)
	s.must(t, 200, "POST", withdraw(strings.ToUpper(nobody)), key, "")
	if again := s.must(t, 200, "POST", "/upload", key, body); again != first {
		t.Errorf("the same upload again answers %s, first %s", again, first)
	}
	if got := s.mustRead(t, "/values", key); len(got) != 0 {
		t.Errorf("the withdrawn run shows %v", got)
	}
}

// What a correction waits for: one of the same series that is at work on any server, and a withdrawal.
func TestCorrectionsWaitOnlyForTheirSeries(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	rows := []string{}
	updates := []string{}
	for i := range maxSeriesLocks + 1 {
		rows = append(rows, fmt.Sprintf(`{"valid_time":"2025-01-01","value_key":"s%d","value":0}`, i))
		updates = append(updates, fmt.Sprintf(`{"valid_time":"2025-01-01","series_key":"s%d","value":1}`, i))
	}
	rows = append(rows, `{"valid_time":"2025-01-01","value_key":"old","value":0}`)
	run := s.mustUpload(t, key, runWith("", rows...))
	mustExec(t, s.db, `UPDATE series_table SET series_key = ' old' WHERE series_key = 'old'`) // of before keys were trimmed
	put := func(n int, value string) string {
		return `{"updates":[` + strings.ReplaceAll(strings.Join(updates[:n], ","), `"value":1`, `"value":`+value) + `]}`
	}
	byID := strings.Replace(put(1, "6"), `"series_key":"s0"`, `"series_id":"`+run.SeriesIDs["s0"]+`"`, 1)
	const corrections = `pg_advisory_xact_lock_shared(hashtextextended($1 || left($2, 0), 0))`
	const series = corrections + `, pg_advisory_xact_lock(hashtext($1), hashtext($2))` // no other tenant's, whatever the key
	const withdrawal = `pg_advisory_xact_lock(hashtextextended($1 || left($2, 0), 0))`
	for _, c := range []struct {
		name, atWork, of   string
		method, path, body string
		waits              bool
	}{
		{"a correction of the series", series, "s0", "PUT", "/values", put(1, "1"), true},
		{"a correction of the series, for one that names it by its id", series, "s0", "PUT", "/values", byID, true},
		{"a correction of another series, for one that names it by its id", series, "s1", "PUT", "/values", byID, false},
		{"a correction of the series, for one with a space before its key", series, "s0", "PUT", "/values",
			strings.Replace(put(1, "7"), `"s0"`, `" s0"`, 1), true},
		{"a correction of a series whose key begins with a space", series, " old", "PUT", "/values",
			strings.Replace(put(1, "8"), `"s0"`, `" old"`, 1), true},
		{"a correction of another series", series, "s1", "PUT", "/values", put(1, "2"), false},
		{"a withdrawal", withdrawal, "s0", "PUT", "/values", put(1, "3"), true},
		{"a correction of as many series as have locks of their own", series, "s100", "PUT", "/values", put(maxSeriesLocks, "4"), false},
		{"corrections, for one of more series", corrections, "s0", "PUT", "/values", put(maxSeriesLocks+1, "5"), true},
		{"corrections, for a withdrawal", corrections, "s0", "POST", "/runs/" + run.RunID + "/withdraw", "{}", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			other, err := s.db.Begin()
			if err != nil {
				t.Fatal(err)
			}
			defer other.Rollback()
			if _, err := other.Exec(`SELECT `+c.atWork, tenantA, c.of); err != nil {
				t.Fatal(err)
			}
			status := make(chan int)
			go func() {
				resp, _, err := s.do(c.method, c.path, key, c.body, "Content-Type: application/json")
				if err != nil {
					t.Error(err)
				}
				status <- resp.StatusCode
			}()
			if c.waits {
				waitUntil(t, "the request waits for the lock", func() bool {
					return mustQuery(t, s.db, `SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'
						AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`) == "1"
				})
				other.Rollback()
			}
			if got := <-status; got != 200 {
				t.Errorf("the request got %d", got)
			}
		})
	}
}

func TestConcurrentWithdrawalsAndCorrectionsAgree(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	run := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", key, oneValue)).RunID
	var answers [4]string
	together(12, func(i int) {
		if i%3 == 0 {
			answers[i/3] = s.expectOK(t, "POST", withdraw(run), key, fmt.Sprintf(`{"annotation":"%d"}`, i))
			return
		}
		resp, text, err := s.do("PUT", "/values", key, update(fmt.Sprintf(`"run_id":"%s","value":%d`, run, 100+i)))
		if err != nil || resp.StatusCode != 200 && resp.StatusCode != 409 {
			t.Errorf("a correction is answered %v %v %s, want 200 or 409", resp, err, text)
		}
	})
	for _, answer := range answers {
		if answer != answers[0] || answer == "" {
			t.Errorf("one of four withdrawals answers %q, another %q", answer, answers[0])
		}
	}
	const late = `SELECT count(*) FROM values_table v JOIN withdrawals_table w USING (tenant_id, run_id)
		WHERE v.change_time >= w.change_time`
	if got := mustQuery(t, s.db, late); got != "0" {
		t.Errorf("%s versions are written after the withdrawal", got)
	}
}

func TestWithdrawnRunTakesNoCorrection(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, _ := mustPicture(t, s)
	runs := mustRuns(t, s) // 1 and 2 have one known_time
	load := func(hh, members string) string {
		return corrections(correctionAt(hh, `"series_key":"load","value":5,`+members))
	}
	const noon = `"known_time":"2024-12-31T12:00:00Z"`
	s.must(t, 200, "POST", withdraw(runs[2]), key, "")
	before := s.stored(t)
	s.runRequests(t, key, []requestCase{
		{"of a value of it", "PUT", "/values", load("03", `"run_id":"`+runs[2]+`"`), 409, []string{"updates[0]", "withdrawn"}},
		{"of a value that it has not", "PUT", "/values", load("07", `"run_id":"`+runs[2]+`"`), 409, []string{"withdrawn"}},
		{"of its annotation alone", "PUT", "/values",
			corrections(correctionAt("03", `"series_key":"load","annotation":"x","run_id":"`+runs[2]+`"`)), 409, []string{"withdrawn"}},
		{"by its id and known_time", "PUT", "/values", load("03", noon+`,"run_id":"`+runs[2]+`"`), 409, []string{"withdrawn"}},
		{"by its id and another known_time", "PUT", "/values",
			load("03", `"known_time":"2024-12-31T00:00:00Z","run_id":"`+runs[2]+`"`), 404, []string{"known_time"}},
	})
	if s.stored(t) != before {
		t.Error("a refused correction stored something")
	}
	s.runRequests(t, key, []requestCase{
		{"by a known_time that another run has", "PUT", "/values", load("03", noon), 200, []string{runs[1], `"version":2`}},
		{"of a new value by that known_time", "PUT", "/values", load("08", noon), 200, []string{runs[1], `"version":2`}},
		{"the other run is withdrawn", "POST", withdraw(runs[1]), "", 200, nil},
		{"by a known_time of which all are withdrawn", "PUT", "/values", load("03", noon), 409, []string{"withdrawn"}},
		{"without a run, of a value of these alone", "PUT", "/values", load("03", `"tags":[]`), 404, nil},
		{"without a run, of a value of a third", "PUT", "/values", load("01", `"tags":[]`), 200, []string{runs[0]}},
	})
}

// ---- The list of corrections

// changes is the list of corrections in short: each as "series valid-end old>value vN", and whether there are more.
func changes(t *testing.T, text string) string {
	t.Helper()
	got := mustDecode[struct {
		Data  []feedRow
		Count int
		More  bool
	}](t, text)
	if got.Count != len(got.Data) {
		t.Errorf("count is %d for %d rows", got.Count, len(got.Data))
	}
	var rows []string
	for _, r := range got.Data {
		row := r.Key + " " + r.Valid.Format("15")
		if r.End != nil {
			row += "-" + r.End.Format("15")
		}
		rows = append(rows, fmt.Sprintf("%s %s>%s v%d", row, jsonText(r.Old), jsonText(r.Value), r.Version))
	}
	if got.More {
		rows = append(rows, "more")
	}
	return strings.Join(rows, ", ")
}

func TestCorrectionsAreListed(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, series := mustPicture(t, s)
	second := s.mustUser(t, tenantA, "B@example.com")
	runs := mustRuns(t, s)
	s.must(t, 200, "POST", "/series", key, `{"name":"100%_x\\y"}`)
	odd := `"series_key":"100%_x\\y","run_id":"` + runs[0] + `"`
	s.must(t, 200, "PUT", "/values", second, corrections(
		correctionAt("00", `"valid_time_end":"2025-01-01T02:00:00Z","series_key":"price","value":null,"tags":["Two words"]`),
		correctionAt("05", `"series_key":"wind","run_id":"`+runs[0]+`","value":-0.0`)))
	s.must(t, 200, "PUT", "/values", key, corrections(correctionAt("00", `"value":1,`+odd)))
	s.must(t, 200, "PUT", "/values", second, corrections(
		correctionAt("00", `"valid_time_end":"2025-01-01T02:00:00Z","series_key":"price","annotation":"a \"note\", <b>"`)))
	// From the oldest on. Those of one request come with the last one first.
	const first, two, odds, last = "load 02 3.5>3.75 v2", "wind 05 null>-0 v2, price 00-02 20>null v2",
		"100%_x\\y 00 null>1 v2", "price 00-02 null>null v3"
	const all = last + ", " + odds + ", " + two + ", " + first
	var times []string // of the rows, from the newest on
	for _, row := range s.mustRead(t, "/corrections", key) {
		times = append(times, url.QueryEscape(row.Change))
	}
	for _, c := range []struct{ name, query, want string }{
		{"all", "", all},
		{"of a limit of all", "limit=5", all},
		{"of a limit of one less", "limit=4", last + ", " + odds + ", " + two + ", more"},
		{"of a limit within one change_time", "limit=3", last + ", " + odds + ", " + two + ", more"},
		{"of a limit before that", "limit=2", last + ", " + odds + ", more"},
		{"until, from there on", "limit=1&until=" + times[1], two + ", more"},
		{"until the first", "until=" + times[4], ""},
		{"since the third last", "since=" + times[2], last + ", " + odds + ", " + two},
		{"since and until", "since=" + times[1] + "&until=" + times[0], odds},
		{"since and until one time", "since=" + times[1] + "&until=" + times[1], ""},
		{"of a series", "series_key=load", first},
		{"of a series by id, and another", "series_id=" + series["wind"] + "&series_key=load", "wind 05 null>-0 v2, " + first},
		{"of a pattern", "match=*r?ce", last + ", price 00-02 20>null v2"},
		{"of a pattern and a series", "match=w*&series_key=load", "wind 05 null>-0 v2, " + first},
		{"of a pattern that finds nothing", "match=pric", ""},
		{"of a pattern in capitals", "match=PRICE", ""},
		{"of a pattern that finds nothing, and a series", "match=nope*&series_key=load", first},
		{"of a pattern with what LIKE knows", "match=100%25_x%5C*", odds},
		{"of a pattern whose percent is itself", "match=1%25", ""},
		{"of a pattern whose underscore is itself", "match=win_", ""},
		{"of valid times", "start_valid=2025-01-01T02:00:00Z&end_valid=2025-01-01T05:00:00Z", first},
		{"of no valid times", "start_valid=2025-01-01T02:00:00Z&end_valid=2025-01-01T02:00:00Z", ""},
		{"by whom", "changed_by=b@example.com", last + ", " + two},
		{"by nobody", "changed_by=b", ""},
		{"of a tag", "tag=%20two%20WORDS", last + ", price 00-02 20>null v2"},
		{"of a part of a tag", "tag=two", ""},
		{"of all at once", "tag=b&changed_by=a@example.com&series_key=load&match=*&limit=1", first},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := changes(t, s.must(t, 200, "GET", "/corrections?"+c.query, key, "")); got != c.want {
				t.Errorf("GET /corrections?%s\nshows %s\nwant  %s", c.query, got, c.want)
			}
		})
	}
	t.Run("as CSV", func(t *testing.T) {
		text := s.must(t, 200, "GET", "/corrections?limit=1", key, "", "Accept: text/csv")
		header, row, _ := strings.Cut(text, "\n")
		if header != "change_time,changed_by,series_id,series_key,series_unit,valid_time,valid_time_end,run_id,"+
			"known_time,version,old_value,value,annotation,tags" {
			t.Errorf("the header is %s", header)
		}
		want := `,"B@example.com","` + series["price"] + `","price","dimensionless",2025-01-01T00:00:00+00:00,` +
			`2025-01-01T02:00:00+00:00,"` + runs[1] + `",`
		expectIn(t, "GET /corrections", row, want, `,3,,,"a ""note"", <b>","[""two words""]"`+"\n")
	})
	s.runRequests(t, key, []requestCase{
		{"of an unknown key", "GET", "/corrections?series_key=nope", "", 404, []string{"series_key"}},
		{"of an unknown key beside a pattern", "GET", "/corrections?series_key=nope&match=*", "", 404, []string{"series_key"}},
		{"of an unknown id", "GET", "/corrections?series_id=" + nobody, "", 404, []string{"series_id"}},
		{"of what is no id", "GET", "/corrections?series_id=x", "", 422, []string{"series_id"}},
		{"of an empty pattern", "GET", "/corrections?match=", "", 422, []string{"match"}},
		{"since what is no time", "GET", "/corrections?since=x", "", 422, []string{"since"}},
		{"since after until", "GET", "/corrections?since=2025-01-02&until=2025-01-01", "", 422, []string{"until"}},
		{"start_valid after end_valid", "GET", "/corrections?start_valid=2025-01-02&end_valid=2025-01-01", "", 422,
			[]string{"end_valid"}},
		{"a limit of zero", "GET", "/corrections?limit=0", "", 422, []string{"limit"}},
		{"a limit beyond the largest", "GET", "/corrections?limit=10001", "", 422, []string{"limit", "10000"}},
		{"the largest limit", "GET", "/corrections?limit=10000", "", 200, []string{`"count":5,"more":false`}},
		{"an empty tag", "GET", "/corrections?tag=", "", 422, []string{"tag"}},
		{"an unknown format", "GET", "/corrections?format=xml", "", 422, []string{"format"}},
		{"an unknown parameter", "GET", "/corrections?as_of=2025-01-01", "", 422, []string{"as_of"}},
		{"a tag twice", "GET", "/corrections?tag=a&tag=b", "", 422, []string{"tag: given twice"}},
	})
}

// ---- Erasure

const runA, runB = "11111111-0000-4000-8000-000000000001", "11111111-0000-4000-8000-000000000002"

// earlyRun is a run known in 2020 that holds values of the series load and wind.
var earlyRun = runWith(`"run_id":"`+runA+`","known_time":"2020-01-01",`,
	at("2025-01-01", "1"), at("2025-01-02", "2"), seriesRow("wind", "2025-01-01", "3"))

// lateRun is one known in 2024 that holds a value of load.
var lateRun = runWith(`"run_id":"`+runB+`","known_time":"2024-01-01",`, at("2025-01-01", "4"))

// mustErasable uploads both runs as tenant A, withdraws the first, corrects the second, and uploads the first as
// tenant B, which has another one too and whose data nothing here may touch.
func mustErasable(t *testing.T) (s *testServer, a, b string) {
	t.Helper()
	s, a = mustTenant(t)
	b = s.mustUser(t, tenantB, "a@example.com")
	s.must(t, 200, "POST", "/upload", a, earlyRun)
	s.must(t, 200, "POST", "/upload", a, lateRun)
	s.must(t, 200, "PUT", "/values", a, corrections(`{"series_key":"load","valid_time":"2025-01-01","value":5}`))
	s.must(t, 200, "POST", "/upload", b, earlyRun)
	s.must(t, 200, "POST", "/upload", b, runWith(`"run_id":"`+tenantB+`",`, seriesRow("secret", "2025-01-01", "1")))
	mustExec(t, s.db, `INSERT INTO withdrawals_table (tenant_id, run_id) VALUES ($1, $2)`, tenantA, runA)
	return s, a, b
}

// mustErase runs a command that erases, on tenant A.
func (s *testServer) mustErase(t *testing.T, want int, line string) (stdout, stderr string) {
	t.Helper()
	return mustRun(t, want, s.dsn, "", append(strings.Fields(line), "-y", "-t", tenantA)...)
}

// ofTenantA counts tenant A's runs, withdrawals, series and rows of values.
const ofTenantA = `SELECT concat_ws(' ',
	(SELECT count(*) FROM runs_table WHERE tenant_id = '` + tenantA + `'),
	(SELECT count(*) FROM withdrawals_table WHERE tenant_id = '` + tenantA + `'),
	(SELECT count(*) FROM series_table WHERE tenant_id = '` + tenantA + `'),
	(SELECT count(*) FROM values_table WHERE tenant_id = '` + tenantA + `'))`

// orphans counts rows of values without their run or their series.
const orphans = `SELECT count(*) FROM values_table v
	WHERE NOT EXISTS (SELECT FROM runs_table r WHERE r.tenant_id = v.tenant_id AND r.run_id = v.run_id)
	   OR NOT EXISTS (SELECT FROM series_table s WHERE s.tenant_id = v.tenant_id AND s.series_number = v.series_number)`

func TestErasureTakesWhatItNamesAndNothingElse(t *testing.T) { // S39
	t.Parallel()
	const allOfA = "2 1 2 4"                 // runs, withdrawals, series, rows of values
	whole, wholeA, wholeB := mustErasable(t) // for those that must erase nothing
	for _, c := range []struct {
		name, line string
		code       int
		left       string
		told       []string // of what the command prints
	}{
		{"a run", "delete runs --run-id " + runA, 0, "1 0 2 2", []string{"1 run(s), 3 value(s), 0 series"}},
		{"a run with its correction", "delete runs --run-id " + runB, 0, "1 1 2 2",
			[]string{"1 run(s), 2 value(s), 0 series"}},
		{"two runs", "delete runs --run-id " + runA + " --run-id " + runB, 0, "0 0 2 0",
			[]string{"2 run(s), 5 value(s), 0 series"}},
		{"runs known before", "delete runs --known-before 2024-01-01", 0, "1 0 2 2",
			[]string{"1 run(s), 3 value(s), 0 series"}},
		{"no run was known before", "delete runs --known-before 2020-01-01", 0, allOfA,
			[]string{"nothing to erase"}},
		{"a series", "delete series -k load", 0, "2 1 1 1", []string{"0 run(s), 4 value(s), 1 series"}},
		{"two series", "delete series -k load --key wind", 0, "2 1 0 0", []string{"0 run(s), 5 value(s), 2 series"}},
		{"the tenant", "delete tenant", 0, "0 0 0 0", []string{"2 run(s), 5 value(s), 2 series", "its users"}},
		{"a run that there is not", "delete runs --run-id " + runA + " --run-id " + nobody, 1, allOfA,
			[]string{nobody}},
		{"a series that there is not", "delete series -k load -k nope", 1, allOfA, []string{"nope"}},
		{"a run of another tenant", "delete runs --run-id " + tenantB, 1, allOfA, []string{tenantB}},
		{"a series of another tenant", "delete series -k secret", 1, allOfA, []string{"secret"}},
		{"a series by its beginning", "delete series -k loa", 1, allOfA, []string{"loa"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, a, b := whole, wholeA, wholeB
			if c.left != allOfA {
				t.Parallel()
				s, a, b = mustErasable(t)
			}
			ofB := s.must(t, 200, "GET", "/values?detail=true&all_versions=true", b, "")
			stdout, stderr := s.mustErase(t, c.code, c.line)
			expectWords(t, stdout+stderr, c.told...)
			if left := mustQuery(t, s.db, ofTenantA); left != c.left {
				t.Errorf("it leaves %s runs, withdrawals, series and rows of values, want %s", left, c.left)
			}
			if got := mustQuery(t, s.db, orphans); got != "0" {
				t.Errorf("it leaves %s values without their run or series", got)
			}
			after := s.must(t, 200, "GET", "/values?detail=true&all_versions=true", b, "")
			if after != ofB {
				t.Errorf("tenant B read %s, and then %s", ofB, after)
			}
			lines := mustQuery(t, s.db, `SELECT string_agg(action || ' of ' || tenant_id || ' by ' || db_role || '/' ||
				os_user || coalesce(email, '') || ': ' || detail, '') FROM audit_table WHERE action LIKE 'delete%'`)
			if c.left == allOfA {
				if lines != "" {
					t.Errorf("it erased nothing, and the trail says %s", lines)
				}
				s.must(t, 200, "GET", "/values", a, "")
				return
			}
			words := strings.Fields(c.line)
			role := mustQuery(t, s.db, `SELECT session_user`)
			expectWords(t, lines, words[0]+" "+words[1]+" of "+tenantA+" by "+role+"/"+operator()+": {", c.told[0])
			if words[1] == "tenant" {
				s.must(t, 401, "GET", "/values", a, "")
				return
			}
			s.must(t, 200, "GET", "/values", a, "")
		})
	}
}

// The same upload again must store nothing, not even an empty series under the key that there was.
func TestUploadRepeatedAfterItsSeriesWasRenamedStoresNothing(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	body := runWith(`"run_id":"`+nobody+`",`, at("2025-01-01", "1"))
	s.must(t, 200, "POST", "/upload", key, body)
	mustRun(t, 0, s.dsn, "", "series", "update", "-t", tenantA, "-k", "load", "--rename", "power")
	before := s.stored(t)
	text := s.must(t, 404, "POST", "/upload", key, body)
	expectIn(t, "the refusal", text, nobody, "renamed")
	if got := s.stored(t); got != before {
		t.Errorf("there was %s, and then %s", before, got)
	}
}

func TestErasedRunIsStoredAnewWhenItIsUploadedAgain(t *testing.T) {
	t.Parallel()
	s, a, _ := mustErasable(t)
	s.must(t, 200, "POST", "/upload", a, earlyRun)
	if got := s.must(t, 200, "GET", "/values?mode=overlapping&detail=true", a, ""); strings.Contains(got, runA) {
		t.Errorf("uploaded again, the withdrawn run is shown: %s", got)
	}
	s.mustErase(t, 0, "delete runs --run-id "+runA)
	s.must(t, 200, "POST", "/upload", a, earlyRun)
	if got := s.must(t, 200, "GET", "/values?mode=overlapping&detail=true", a, ""); strings.Count(got, runA) != 3 {
		t.Errorf("stored anew, of its three values there are %s", got)
	}
	if got := mustQuery(t, s.db, ofTenantA); got != "2 0 2 4" {
		t.Errorf("there are %s runs, withdrawals, series and rows of values, want 2 0 2 4", got)
	}
}

func TestErasedTenantLeavesNoAddressInTheTrail(t *testing.T) { // S39
	t.Parallel()
	s, _, _ := mustErasable(t)
	s.mustErase(t, 0, "delete tenant")
	got := mustQuery(t, s.db, `SELECT string_agg(left(tenant_id::text, 1) || ' ' || coalesce(email, 'none'), ', '
		ORDER BY audit_id) FROM audit_table`)
	if got != "a none, b a@example.com, a none" {
		t.Errorf("the trail has %s", got)
	}
	got = mustQuery(t, s.db, `SELECT string_agg(tenant_id::text, ' ') FROM (
		SELECT tenant_id FROM users_table UNION ALL SELECT tenant_id FROM keys_table) AS x`)
	if got != tenantB+" "+tenantB {
		t.Errorf("there are users and keys of %s, want tenant B's alone", got)
	}
}

// What docs/OPERATIONS.md has an operator run leaves nothing of a person, and everything else.
func TestAddressOfAPersonIsErasedAsTheDocumentSays(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)```sql\n\\\\set ON_ERROR_STOP on\n(BEGIN;.*?COMMIT;)\n```").FindSubmatch(page)
	if block == nil {
		t.Fatal("docs/OPERATIONS.md has no such block")
	}
	s, key := mustTenant(t)
	alice := s.mustUser(t, tenantA, "alice@example.com")
	mustRun(t, 0, s.dsn, "", "keys", "create", "-e", "alice@example.com", "--name", "second")
	s.must(t, 200, "POST", "/upload", key, oneValue)
	run := s.mustUpload(t, alice, runWith("", at("2025-01-01", "7"))).RunID
	s.must(t, 200, "PUT", "/values", alice, `{"updates":[{"series_key":"load","valid_time":"2025-01-01","value":8}]}`)
	s.must(t, 200, "POST", "/runs/"+run+"/withdraw", alice, "")
	waitUntil(t, "the key's use is noted", func() bool { return mustQuery(t, s.db, `SELECT count(*) FROM key_uses`) == "2" })
	mustExec(t, s.db, strings.ReplaceAll(string(block[1]), "…", tenantA))
	dump, err := exec.Command("pg_dump", s.dsn).Output()
	if err != nil {
		t.Fatal(err)
	}
	if found := regexp.MustCompile(`(?i).*alice@.*`).Find(dump); found != nil {
		t.Errorf("left of the address: %s", found)
	}
	if got := mustQuery(t, s.db, `SELECT concat_ws(' ', (SELECT count(*) FROM users_table), (SELECT count(*) FROM keys_table),
		(SELECT count(*) FROM key_uses), (SELECT count(*) FROM runs_table), (SELECT count(*) FROM values_table))`); got != "1 1 1 2 3" {
		t.Errorf("users, keys, uses, runs and rows are %s, want 1 1 1 2 3", got)
	}
}

func TestTenantIsErasedWithoutUsersTable(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn)
	s := mustAPI(t, dsn)
	s.must(t, 200, "POST", "/upload", "", oneValue)
	stdout, _ := mustRun(t, 0, dsn, "", "delete", "tenant", "-y", "-t", openTenant)
	expectWords(t, stdout, "1 run(s), 1 value(s), 1 series")
	if got := s.stored(t); got != "0 0 0" {
		t.Errorf("it leaves %s", got)
	}
}

// The write has found its run and series, and waits for the lock that the erasure holds.
func TestWriteThatAnErasureOvertakesIs404AndStoresNothing(t *testing.T) {
	t.Parallel()
	const correction = `{"series_key":"load","valid_time":"2025-01-01","value":7}`
	for _, c := range []struct{ name, method, path, body, erases string }{
		{"an upload whose series goes", "POST", "/upload", runWith("", at("2025-03-01", "1")),
			`DELETE FROM series_table WHERE series_key = 'load' AND tenant_id = $1`},
		{"an upload one of whose series goes", "POST", "/upload",
			runWith("", at("2025-03-01", "1"), seriesRow("wind", "2025-03-01", "1")),
			`DELETE FROM series_table WHERE series_key = 'wind' AND tenant_id = $1`},
		{"a correction whose series goes", "PUT", "/values", corrections(correction),
			`DELETE FROM series_table WHERE series_key = 'load' AND tenant_id = $1`},
		{"a correction whose run goes", "PUT", "/values", corrections(correction),
			`DELETE FROM runs_table WHERE workflow_id = 'late' AND tenant_id = $1`},
		{"a correction that gains a value of a run that goes", "PUT", "/values",
			corrections(`{"series_key":"wind","run_id":"` + runB + `","valid_time":"2025-01-05","value":7}`),
			`DELETE FROM runs_table WHERE workflow_id = 'late' AND tenant_id = $1`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s, key := mustTenant(t)
			s.must(t, 200, "POST", "/upload", key, earlyRun)
			s.must(t, 200, "POST", "/upload", key, strings.Replace(lateRun, "{", `{"workflow_id":"late",`, 1))
			tx, err := s.db.Begin()
			if err != nil {
				t.Fatal(err)
			}
			defer tx.Rollback()
			if _, err := tx.Exec(`LOCK TABLE values_table IN SHARE ROW EXCLUSIVE MODE`); err != nil {
				t.Fatal(err)
			}
			answered := make(chan string)
			go func() {
				resp, text, err := s.do(c.method, c.path, key, c.body)
				answered <- fmt.Sprint(resp.StatusCode, " ", text, err)
			}()
			s.waitForLockWaits(t, "values_table", 1)
			if _, err := tx.Exec(c.erases, tenantA); err != nil {
				t.Fatal(err)
			}
			if err := tx.Commit(); err != nil {
				t.Fatal(err)
			}
			if got := <-answered; !strings.HasPrefix(got, "404 ") || !strings.Contains(got, "erased") {
				t.Errorf("it is answered %s, want 404 that says what happened", got)
			}
			written := mustQuery(t, s.db, `SELECT count(*) FROM values_table
				WHERE version > 1 OR valid_from > '2025-01-02'`)
			runs := mustQuery(t, s.db, `SELECT count(*) FROM runs_table WHERE workflow_id = 'api-workflow'`)
			if written != "0" || runs != "1" {
				t.Errorf("it stored %s rows, and there are %s runs", written, runs)
			}
		})
	}
}

// Whatever erases waits for the writers that have begun, and may be stopped meanwhile.
func TestErasureThatIsStoppedErasesNothing(t *testing.T) { // S12
	if onCitus() {
		t.Skip("who waits for a lock of Citus waits on a node, where this does not look")
	}
	t.Parallel()
	for _, line := range []string{
		"delete runs --run-id " + runA,
		"delete series -k load",
		"delete tenant",
	} {
		t.Run(line, func(t *testing.T) {
			t.Parallel()
			s, a, _ := mustErasable(t)
			before := s.must(t, 200, "GET", "/values?detail=true&all_versions=true", a, "")
			tx, err := s.db.Begin()
			if err != nil {
				t.Fatal(err)
			}
			defer tx.Rollback()
			if _, err := tx.Exec(`LOCK TABLE values_table IN ROW EXCLUSIVE MODE`); err != nil {
				t.Fatal(err)
			}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			ended := make(chan int)
			go func() {
				env := func(name string) string { return map[string]string{"TIMEDB_DSN": s.dsn}[name] }
				args := append(strings.Fields(line), "-y", "-t", tenantA)
				ended <- run(ctx, args, env, strings.NewReader(""), io.Discard, io.Discard)
			}()
			s.waitForLockWaits(t, "values_table", 1)
			s.must(t, 200, "GET", "/values", a, "") // readers do not wait
			stop()
			if code := <-ended; code != 1 {
				t.Errorf("exit %d, want 1", code)
			}
			if err := tx.Commit(); err != nil {
				t.Fatal(err)
			}
			if got := s.must(t, 200, "GET", "/values?detail=true&all_versions=true", a, ""); got != before {
				t.Errorf("tenant A read %s, and then %s", before, got)
			}
			if got := mustQuery(t, s.db, ofTenantA); got != "2 1 2 4" {
				t.Errorf("there are %s runs, withdrawals, series and rows of values", got)
			}
			if got := mustQuery(t, s.db, `SELECT count(*) FROM audit_table WHERE action LIKE 'delete%'`); got != "0" {
				t.Errorf("the trail has %s lines on it", got)
			}
			s.mustErase(t, 0, line)
		})
	}
}

// ---- SQL

const northTenant = "7d1f0c52-3b8e-4f5a-9c46-2a6be01d9f37" // of docs/SQL.md

// north is a server with the data that the queries of docs/SQL.md ask for, its tenant's key, the SQL of the page as it
// runs there, and the database as the tenant's role that the page creates.
type north struct {
	*testServer
	key                              string
	means, newest, forecast, grafana string
	reader                           *sql.DB
}

// mustNorth uploads the data and runs the page's SQL for the tenant's role.
func mustNorth(t *testing.T) north {
	t.Helper()
	n := north{testServer: mustServer(t)}
	n.key = n.mustUser(t, northTenant, "north@example.com")
	mustUploadNorth(t, n)

	page, err := os.ReadFile("docs/SQL.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)\n```sql\n(.*?)```").FindAllStringSubmatch(string(page), -1)
	expanded := regexp.MustCompile("expand: `(.*)`, and `(.*)`").FindStringSubmatch(string(page))
	if len(blocks) != 5 || expanded == nil {
		t.Fatalf("docs/SQL.md has %d blocks of SQL and macros %q", len(blocks), expanded)
	}
	n.means, n.newest, n.forecast = blocks[0][1], blocks[1][1], blocks[2][1]
	createRole := blocks[3][1]
	macros := strings.NewReplacer("$__time(valid_time)", expanded[1], "$__timeFilter(valid_time)", expanded[2])
	n.grafana = macros.Replace(blocks[4][1])

	// A role belongs to the cluster, and this test's database has another name.
	role := fmt.Sprintf("timedb_test_north_%016x", rand.Uint64())
	password := fmt.Sprintf("north-password-%x", rand.Uint64())
	database := strings.TrimPrefix(mustParse(t, n.dsn).Path, "/")
	names := strings.NewReplacer("north_reader", role, "DATABASE timedb", "DATABASE "+database)
	t.Cleanup(func() { mustExec(t, n.db, "DROP OWNED BY "+role+"; DROP ROLE "+role) })
	mustExec(t, n.db, "GRANT CREATE ON SCHEMA public TO PUBLIC") // as PostgreSQL 14 has it
	mustExec(t, n.db, names.Replace(createRole))
	mustExec(t, n.db, "ALTER ROLE "+role+" PASSWORD '"+password+"'")
	n.reader = mustOpen(t, databaseURL(database, url.UserPassword(role, password))+"&timezone=UTC")
	return n
}

// mustUploadNorth uploads the data of the page's tenant, and the same series with other values as tenant B.
func mustUploadNorth(t *testing.T, n north) {
	t.Helper()
	other := n.mustUser(t, tenantB, "b@example.com")
	// day is rows from an hour before 2025-01-02 to an hour after it; the value grows by one with each step.
	day := func(value int, series string, step time.Duration) string {
		begin := time.Date(2025, 1, 2, 0, 0, 0, 0, time.UTC)
		var rows strings.Builder
		for since := -time.Hour; since <= 24*time.Hour; since += step {
			fmt.Fprintf(&rows, "%s,%s,%d\n", begin.Add(since).Format(time.RFC3339), series, value+int(since/step))
		}
		return rows.String()
	}
	now := time.Now().UTC().Truncate(time.Hour) // with the value after it, in the middle of a row of values_table
	later := fmt.Sprintf("%s,wind_measured,-7\n%s,wind_measured,-8\n",
		now.Format(time.RFC3339), now.Add(5*time.Hour).Format(time.RFC3339)) + "2025-01-02T00:00Z,single,3\n"
	for _, run := range []struct{ key, known, rows string }{
		{n.key, "2025-01-01T12:00Z", day(100, "wind_forecast", time.Hour)},
		{n.key, "2025-01-02T06:00Z", day(200, "wind_forecast", time.Hour)},
		{n.key, "2025-01-03", day(90, "wind_measured", 20*time.Minute) + later},
		{other, "2025-01-01T13:00Z", day(700, "wind_forecast", time.Hour)},
		{other, "2025-01-03", day(700, "wind_measured", time.Minute)},
	} {
		n.must(t, 200, "POST", "/upload?run_start_time=2025-01-01&known_time="+run.known, run.key,
			"valid_time,value_key,value\n"+run.rows, "Content-Type: text/csv")
	}
	wrong := mustDecode[uploadAnswer](t, n.must(t, 200, "POST",
		"/upload?run_start_time=2025-01-01&known_time=2025-01-01T18:00Z", n.key,
		"valid_time,value_key,value\n"+day(900, "wind_forecast", time.Hour)+day(900, "wind_measured", time.Minute)+
			now.Add(-time.Minute).Format(time.RFC3339)+",wind_measured,900\n", "Content-Type: text/csv"))
	n.must(t, 200, "POST", withdraw(wrong.RunID), n.key, "")
	null := func(at string) string {
		return `{"series_key":"wind_measured","valid_time":"2025-01-02T` + at + `Z","value":null}`
	}
	n.must(t, 200, "PUT", "/values", n.key, corrections(null("05:20"), null("07:00"), null("07:20"), null("07:40"),
		`{"series_key":"wind_forecast","valid_time":"2025-01-02T03:00Z","known_time":"2025-01-01T12:00Z","value":50}`))
}

func TestQueriesOfTheSQLDocumentAnswerAsTheAPIDoes(t *testing.T) {
	t.Parallel()
	n := mustNorth(t)
	const day = "/values?start_valid=2025-01-02&end_valid=2025-01-03&series_key="
	type row = map[string]any
	var means, newest, forecast, grafana []row

	for _, r := range n.mustRead(t, day+"wind_measured&bucket=PT1H&agg=mean", n.key) {
		means = append(means, row{"hour": r.Valid, "mean": r.Value})
	}
	newestOf := map[string]answerRow{}
	end := time.Now().UTC().Add(time.Second) // end_valid itself is not shown, and a value may be of this very second
	for _, r := range n.mustRead(t, "/values?end_valid="+end.Format(time.RFC3339), n.key) {
		newestOf[r.Series] = r
	}
	for _, id := range slices.Sorted(maps.Keys(newestOf)) {
		r := newestOf[id]
		newest = append(newest, row{"series_key": r.Key, "valid_time": r.Valid, "value": r.Value, "unit": r.Unit})
	}
	measured := map[time.Time]float64{}
	for _, r := range n.mustRead(t, day+"wind_measured", n.key) {
		grafana = append(grafana, row{"time": r.Valid, "wind_measured": r.Value})
		if r.Value != nil {
			measured[r.Valid] = *r.Value
		}
	}
	for _, r := range n.mustRead(t, day+"wind_forecast&end_known=2025-01-02", n.key) {
		if m, found := measured[r.Valid]; found {
			forecast = append(forecast, row{
				"valid_time": r.Valid, "forecast": r.Value, "measured": m, "error": *r.Value - m})
		}
	}

	owner := mustOpen(t, n.dsn+"&timezone=UTC")
	for _, c := range []struct {
		name, query string
		want        []row
		rows        int
		known       string // is in the answer, so that the API and the SQL are not wrong together
	}{
		{"hourly means", n.means, means, 23, `05:00:00Z","mean":106}`},
		{"the newest value of each series", n.newest, newest, 3, `"value":-7}`},
		{"a forecast against what was measured", n.forecast, forecast, 23,
			`{"error":-49,"forecast":50,"measured":99,`},
		{"a panel of Grafana", n.grafana, grafana, 72, `05:20:00Z","wind_measured":null}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			want := jsonText(c.want)
			if len(c.want) != c.rows || !strings.Contains(want, c.known) {
				t.Errorf("the API answers %d rows %s, want %d and %s in them", len(c.want), want, c.rows, c.known)
			}
			rows := strings.TrimSuffix(c.query, ";\n")
			query := "SELECT replace(json_agg(q)::text, '+00:00', 'Z') FROM (" + rows + ") AS q"
			for _, as := range []struct {
				name string
				db   *sql.DB
			}{{"owner", owner}, {"role", n.reader}} {
				if got := jsonText(mustDecode[[]row](t, mustQuery(t, as.db, query))); got != want {
					t.Errorf("%s\nanswers the %s\n%s\nwant\n%s", c.query, as.name, got, want)
				}
			}
		})
	}
}

func TestSQLRoleOfATenantSeesItsTenantAndNothingElse(t *testing.T) {
	t.Parallel()
	n := mustNorth(t)
	// tell fails when it is given another tenant. It is so cheap that the planner would like to call it before the
	// view's own condition.
	mustExec(t, n.db, `CREATE FUNCTION tell(tenant uuid) RETURNS boolean
		IMMUTABLE COST 0.0001 LANGUAGE plpgsql AS $$ BEGIN
		IF tenant <> '`+northTenant+`' THEN RAISE EXCEPTION 'told of %', tenant; END IF; RETURN true; END $$`)
	for _, view := range []string{"current_values", "value_blocks", "series_table"} {
		t.Run("rows of "+view, func(t *testing.T) {
			const digest = `SELECT concat(count(*), ' ', md5(string_agg(v::text, ',' ORDER BY v::text))) FROM `
			want := mustQuery(t, n.db, digest+"public."+view+" v WHERE tenant_id = $1", northTenant)
			if got := mustQuery(t, n.reader, digest+view+" v"); got != want || strings.HasPrefix(got, "0") {
				t.Errorf("%s shows the role %s, want %s", view, got, want)
			}
			mustExec(t, n.reader, `SET enable_indexscan = off; SET enable_bitmapscan = off;
				SELECT FROM `+view+` WHERE public.tell(tenant_id)`)
		})
	}
	owner := pq.QuoteIdentifier(mustQuery(t, n.db, `SELECT current_user`))
	for _, c := range []struct{ name, statement string }{
		{"read current_values of all", `SELECT FROM public.current_values`},
		{"read values_table of all", `SELECT FROM public.values_table`},
		{"read value_blocks of all", `SELECT FROM public.value_blocks`},
		{"read series_table of all", `SELECT FROM public.series_table`},
		{"read runs_table", `SELECT FROM public.runs_table`},
		{"read users_table", `SELECT FROM public.users_table`},
		{"read keys_table", `SELECT FROM public.keys_table`},
		{"read the audit trail", `SELECT FROM public.audit_table`},
		{"insert a run", `INSERT INTO public.runs_table (tenant_id) VALUES (NULL)`},
		{"activate a user", `UPDATE public.users_table SET is_active = true`},
		{"insert a series through the view", `INSERT INTO series_table (series_key) VALUES ('x')`},
		{"change withdrawals through the view", `UPDATE withdrawals_table SET annotation = 'x'`},
		{"delete series through the view", `DELETE FROM series_table`},
		{"truncate values_table", `TRUNCATE public.values_table`},
		{"drop its view", `DROP VIEW north.current_values`},
		{"create a table in public", `CREATE TABLE public.x ()`},
		{"create a table in its schema", `CREATE TABLE north.x ()`},
		{"create a temporary table", `CREATE TEMPORARY TABLE x ()`},
		{"create a schema", `CREATE SCHEMA x`},
		{"create a view", `CREATE VIEW north.x AS SELECT`},
		{"create a temporary function", `CREATE FUNCTION pg_temp.x() RETURNS int RETURN 1`},
		{"create a function in public", `CREATE FUNCTION public.x() RETURNS int RETURN 1`},
		{"create a role", `CREATE ROLE x`},
		{"run a program", `COPY (SELECT) TO PROGRAM 'true'`},
		{"read a file of the server", `SELECT pg_read_file('PG_VERSION')`},
		{"become the owner", `SET ROLE ` + owner},
	} {
		t.Run("may not "+c.name, func(t *testing.T) {
			_, err := n.reader.Exec(c.statement)
			if failed, ok := errors.AsType[*pq.Error](err); !ok || failed.Code != "42501" {
				t.Errorf("%s: %v, want it to be denied", c.statement, err)
			}
		})
	}
	limits := mustQuery(t, n.reader, `SELECT concat_ws(' ', current_setting('statement_timeout'),
		current_setting('search_path'), rolconnlimit) FROM pg_roles WHERE rolname = user`)
	if limits != "30s north 5" {
		t.Errorf("the role's limits are %q", limits)
	}
}

func TestTablesUnderATenantsViewsAreUpgradedAndNotDeleted(t *testing.T) {
	t.Parallel()
	n := mustNorth(t)
	mustCreateTables(t, n.dsn) // as an upgrade does
	if _, stderr := mustRun(t, 1, n.dsn, "", "delete", "tables", "-y"); !strings.Contains(stderr, "depend") {
		t.Errorf("delete tables beside the tenant's schema says %q", stderr)
	}
	mustExec(t, n.db, "DROP SCHEMA north CASCADE")
	mustRun(t, 0, n.dsn, "", "delete", "tables", "-y")
}

// ---- Benchmarks

// hourly is the time so many hours after 2025 has begun.
func hourly(hours int) string {
	begin := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	return begin.Add(time.Duration(hours) * time.Hour).Format(time.RFC3339)
}

// mustForecasts uploads so many runs of so many hourly values of load, each known an hour later
// than the one before, and returns their ids. All begin at the same valid_time.
func (s *testServer) mustForecasts(t testing.TB, key string, runs, values int) []string {
	t.Helper()
	var rows []string
	for i := range values {
		rows = append(rows, at(hourly(i), "1.5"))
	}
	var ids []string
	for i := range runs {
		body := runWith(fmt.Sprintf(`"known_time":%q,`, hourly(i)), rows...)
		text := s.must(t, 200, "POST", "/upload", key, body)
		ids = append(ids, mustDecode[uploadAnswer](t, text).RunID)
	}
	return ids
}

// BenchmarkCorrection corrects one value of a series. S37 allows it five times the time of a quiet
// series if the series is busy, which means that it has 200 runs of every valid_time.
func BenchmarkCorrection(b *testing.B) {
	for _, c := range []struct {
		name string
		runs int
	}{{"quiet", 1}, {"busy", 200}} {
		b.Run(c.name, func(b *testing.B) {
			s, key := mustTenant(b)
			const hours = 480
			s.mustForecasts(b, key, c.runs, hours)
			b.ResetTimer()
			for i := range b.N {
				s.must(b, 200, "PUT", "/values", key, corrections(fmt.Sprintf(
					`{"series_key":"load","valid_time":%q,"value":%d}`, hourly(i%hours), 10+i)))
			}
		})
	}
}

// BenchmarkCorrections10000 corrects 10,000 values in one request: of as many hours of which there
// is one run; of as many hours of which there are 200 runs; of 50 hours as 200 runs have them. Or
// one run gains 10,000 values.
func BenchmarkCorrections10000(b *testing.B) {
	for _, c := range []struct {
		name                 string
		runs, values         int
		perRun, first, hours int // the runs that updates name, and the hours
	}{
		{"quiet", 1, maxUpdates, 0, 0, maxUpdates},
		{"busy", 200, maxUpdates, 0, 0, maxUpdates},
		{"named", 200, 480, 200, 100, maxUpdates / 200},
		{"gained", 1, 480, 1, 1000, maxUpdates},
	} {
		b.Run(c.name, func(b *testing.B) {
			s, key := mustTenant(b)
			runs := s.mustForecasts(b, key, c.runs, c.values)
			b.ResetTimer()
			for n := range b.N {
				first := c.first
				if c.name == "gained" {
					first += n * c.hours // each time other values
				}
				var entries []string
				for i := range maxUpdates {
					name := ""
					if c.perRun > 0 {
						name = fmt.Sprintf(`"run_id":%q,`, runs[i/c.hours])
					}
					entries = append(entries, fmt.Sprintf(
						`{"series_key":"load",%s"valid_time":%q,"value":%d}`,
						name, hourly(first+i%c.hours), 10+n))
				}
				text := s.must(b, 200, "PUT", "/values", key, corrections(entries...))
				if changed := strings.Count(text, "value_id"); changed != maxUpdates {
					b.Fatalf("%d values changed, want %d", changed, maxUpdates)
				}
			}
		})
	}
}

// ---- Parsers

func FuzzParseTime(f *testing.F) {
	for _, seed := range []string{"2025-01-01T00:00:00Z", "2025-01-01", "2025-01-01 05:30 05:30",
		"1677-01-01T00:00:00.000001-23:59", "2262-12-31T23:59:59.999999999Z", "2025-02-29T00:00:00Z",
		"2025-01-01T24:00:00Z"} {
		f.Add(seed)
	}
	// time.Parse takes more than RFC 3339.
	strict := regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$`)
	f.Fuzz(func(t *testing.T, s string) {
		var got, again timestamp
		err := got.UnmarshalText([]byte(s))
		want, wantErr := time.Parse(time.RFC3339Nano, s)
		year := want.UTC().Year()
		_, offset := want.Zone()
		valid := wantErr == nil && year >= 1677 && year <= 2262 && offset >= -12*3600 && offset <= 14*3600
		if strict.MatchString(s) && (err == nil) != valid {
			t.Fatalf("%q: %v, time.Parse: %v", s, err, wantErr)
		}
		if err != nil {
			return
		}
		text := got.String()
		if strict.MatchString(s) && text != iso6(want) {
			t.Errorf("%q is read as %s, want %s", s, text, iso6(want))
		}
		if err := again.UnmarshalText([]byte(text)); err != nil || again != got {
			t.Errorf("%q is written as %s, which is read as %v, %v", s, text, again, err)
		}
		var asBound bound
		if err := asBound.UnmarshalText([]byte(s)); err != nil || timestamp(asBound) != got {
			t.Errorf("%q is read as %s, and as a bound as %s, %v", s, got, timestamp(asBound), err)
		}
	})
}

func FuzzBound(f *testing.F) {
	for _, seed := range []string{"0000-01-01", "0001-01-01", "9999-12-31T23:59:59.999999999-12:00", "2025-01-01",
		"1676-12-31T23:59:59Z", "2263-01-01 00:00"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var b bound
		if err := b.UnmarshalText([]byte(s)); err == nil && (timestamp(b) < firstTime || timestamp(b) > lastTime) {
			t.Errorf("%q is read as %d", s, b)
		}
	})
}

// A pattern of SQL's LIKE means the same as what it was made from.
func FuzzPattern(f *testing.F) {
	f.Add("a*_%?", "ab_%c")
	f.Add(`\*`, `\x`)
	f.Add("?", "ü")
	f.Fuzz(func(t *testing.T, text, key string) {
		if len(text)+len(key) > 20 || strings.Count(text, "*") > 3 {
			return // the naive matchers take long
		}
		var p pattern
		err := p.UnmarshalText([]byte(text))
		var l label
		if (err == nil) != (l.UnmarshalText([]byte(text)) == nil) {
			t.Fatalf("%q: %v", text, err)
		}
		if err == nil && likes([]rune(p), []rune(key)) != matchesRunes([]rune(strings.TrimSpace(text)), []rune(key)) {
			t.Errorf("%q LIKE %q is not what %q says", key, p, text)
		}
	})
}

// matchesRunes tells whether all of a text is what a pattern says.
func matchesRunes(pattern, text []rune) bool {
	switch {
	case len(pattern) == 0:
		return len(text) == 0
	case pattern[0] == '*':
		return matchesRunes(pattern[1:], text) || len(text) > 0 && matchesRunes(pattern, text[1:])
	case len(text) == 0:
		return false
	}
	return (pattern[0] == '?' || pattern[0] == text[0]) && matchesRunes(pattern[1:], text[1:])
}

// likes is LIKE as PostgreSQL's manual describes it.
func likes(like, text []rune) bool {
	if len(like) == 0 {
		return len(text) == 0
	}
	if like[0] == '%' {
		return likes(like[1:], text) || len(text) > 0 && likes(like, text[1:])
	}
	isAny := like[0] == '_'
	if like[0] == '\\' {
		like = like[1:]
	}
	return len(like) > 0 && len(text) > 0 && (isAny || like[0] == text[0]) && likes(like[1:], text[1:])
}

// iso6 is t as the API writes it.
func iso6(t time.Time) string {
	t = t.UTC().Truncate(time.Microsecond)
	if t.Nanosecond() == 0 {
		return t.Format("2006-01-02T15:04:05-07:00")
	}
	return t.Format("2006-01-02T15:04:05.000000-07:00")
}

func FuzzSpan(f *testing.F) {
	for _, seed := range []string{"PT36H", "P1D", "P1W2DT3H4M5.5S", "90m", "1h30m", "P", "PT", "P1M", "-1h", "0s",
		"P99999W", "PT9999999999999999H", "1ns", "PT2562047H47M16.854775807SP100000D"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var got span
		err := got.UnmarshalText([]byte(s))
		if err == nil && (got < 0 || timestamp(got) < 0) {
			t.Errorf("%q is read as %d", s, got)
		}
		d, goErr := time.ParseDuration(s)
		if goErr == nil && err == nil && int64(timestamp(got)) != d.Microseconds() {
			t.Errorf("%q is read as %d µs, want %v", s, timestamp(got), d)
		}
	})
}

func FuzzWidth(f *testing.F) {
	for _, seed := range []string{"P1D", "P7D", "P1W", "P2W", "P1M", "P3M", "P1Y", "P999Y", "P1M2D", "P1DT12H", "24h",
		"1d", "PT24H", "P", "P0D", "PT0S", "P9999W", "P\u0661D"} {
		f.Add(seed, "Europe/Berlin", int64(0))
	}
	f.Add("P1D", "America/St_Johns", int64(unixEpoch)+1_162_089_000_000_000) // 2006-10-29T02:30Z
	f.Add("P1M", "Pacific/Apia", int64(unixEpoch)+1_325_239_200_000_000)     // 2011-12-30T10:00Z
	f.Add("P1M", "Africa/Cairo", int64(unixEpoch)+4_888_684_800_000_000)     // 2124-12-01
	f.Add("P1Y", "localtime", int64(unixEpoch)-1)
	f.Add("P1D", "../etc/passwd", int64(lastTime))
	f.Fuzz(func(t *testing.T, length, tz string, at int64) {
		var w width
		var z zone
		if w.UnmarshalText([]byte(length)) != nil || z.UnmarshalText([]byte(tz)) != nil {
			return
		}
		if z.Location == nil || z.String() != tz {
			t.Fatalf("the zone %q is %v", tz, z.Location)
		}
		instant := min(max(timestamp(at), firstTime), lastTime-1)
		expectTiles(t, w, z, instant)
	})
}

func FuzzTimeOfDay(f *testing.F) {
	for _, seed := range []string{"00:00", "23:59:59", "9:30", "24:00", "12:00Z", "12:00:00.5", "12:00+01", "", "12"} {
		f.Add(seed)
	}
	strict := regexp.MustCompile(`^([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9])?$`)
	f.Fuzz(func(t *testing.T, s string) {
		var got timeOfDay
		err := got.UnmarshalText([]byte(s))
		if (err == nil) != strict.MatchString(s) || got < 0 || got >= timeOfDay(day) {
			t.Errorf("%q is read as %d, %v", s, got, err)
		}
	})
}

func FuzzNumber(f *testing.F) {
	for _, seed := range []string{"1", "-0", "1e308", "1e309", "NaN", "", "Infinity", "0x1p-2", "1_0", "5e-324", "+1",
		"nan", "null"} {
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
	f.Add(encodeValues([]point{{value: 1}, {value: math.NaN()}, {value: math.Inf(1)}}))
	f.Add(encodeValues(nil))
	f.Add([]byte{0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 189, 255, 255, 255, 255, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, wire []byte) {
		_, _ = decodeArray(nil, wire) // must not panic, whatever the database sends
		want := []uint64{42}
		var points []point
		for i := range len(wire) / 8 {
			value := math.Float64frombits(binary.BigEndian.Uint64(wire[8*i:]))
			if math.IsNaN(value) {
				value = math.NaN() // the one that stands for NULL
			}
			points = append(points, point{value: value})
			want = append(want, math.Float64bits(value))
		}
		if len(points) == 0 {
			return // no row holds an empty array
		}
		got, err := decodeArray([]uint64{42}, encodeValues(points))
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%x comes back as %x, %v", want, got, err)
		}
	})
}
