package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"database/sql/driver"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"mime"
	"net/http"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	// readTimeout lets a slow line send a full body. writeTimeout begins anew with each piece of a stream.
	readHeaderTimeout = 10 * time.Second
	readTimeout       = 2 * time.Minute
	writeTimeout      = 30 * time.Second
	idleTimeout       = 2 * time.Minute
	drainTimeout      = 30 * time.Second // for running requests after SIGTERM
	requestTimeout    = 30 * time.Second // for the database's part of a request, and for a connection to become free

	// net/http adds 4 KiB to what it is told: headers beyond 16 KiB are answered 431.
	maxHeaderBytes = 12 << 10

	maxBody    = 64 << 20 // some 600,000 rows, of 24 bytes each once decoded
	maxUpdates = 10_000   // per PUT /values: they hold their tenant's lock together
	maxParams  = 16 << 10

	maxRuns = 10_000 // per GET /runs: they are collected in memory

	flushBytes = 64 << 10 // of a stream at a time
	onePacket  = 1400     // bytes

	defaultUnit = "dimensionless"
)

// apiError is a status and the sentence for {"detail": …}. Any other error becomes a 500 that explains nothing.
type apiError struct {
	status  int
	message string
	reason  string // for the log alone; "" when the message says it all
}

func (e *apiError) Error() string { return e.message }

func refusal(status int, format string, args ...any) error {
	return &apiError{status, fmt.Sprintf("%.1000s", fmt.Sprintf(format, args...)), ""} // whatever a client put into it
}
func invalid(format string, args ...any) error  { return refusal(422, format, args...) }
func notFound(format string, args ...any) error { return refusal(404, format, args...) }
func conflict(format string, args ...any) error { return refusal(409, format, args...) }

type access string // as GET / words it

const (
	open       access = "open" // holds no data; anything else, the zero value too, asks for a key
	needsRead  access = "needs an API key"
	needsWrite access = "needs an API key that may write"
)

// route is one line of the route table. handle reads the request, and returns what answers it within limit (0: none).
type route struct {
	pattern string
	access  access
	limit   time.Duration
	handle  func(w *response, r *http.Request, c Caller) (work, error)
}

// work answers a request: what it returns is sent as JSON, unless it is nil: then it was sent already.
type work func(ctx context.Context) (any, error)

// server serves HTTP. It keeps no state that another server of the same database would have to know.
type server struct {
	store  *store
	auth   *authenticator
	log    *slog.Logger
	mux    *http.ServeMux // only finds the pattern; serve calls its route
	routes map[string]route
}

func (s *server) table() []route {
	return []route{
		{"GET /{$}", open, 0, s.getRoot},
		{"GET /healthz", open, lookupTimeout, s.getHealth},
		{"POST /upload", needsWrite, requestTimeout, s.postUpload},
		{"GET /values", needsRead, 0, s.getValues}, // a stream may last, as long as it moves
		{"PUT /values", needsWrite, requestTimeout, s.putValues},
		{"POST /series", needsWrite, requestTimeout, s.postSeries},
		{"GET /list_timeseries", needsRead, requestTimeout, s.getSeries},
		{"GET /runs", needsRead, requestTimeout, s.getRuns},
	}
}

func newServer(st *store, auth *authenticator, log *slog.Logger) *server {
	s := &server{st, auth, log, http.NewServeMux(), map[string]route{}}
	for _, rt := range s.table() {
		s.routes[rt.pattern] = rt
		s.mux.Handle(rt.pattern, http.NotFoundHandler())
	}
	return s
}

// response remembers what was answered, and compresses it if the client accepts that and it does not fit one packet.
type response struct {
	http.ResponseWriter
	accepts string // the request's Accept-Encoding
	status  int    // 0: nothing was sent yet
	zip     *gzip.Writer
}

var gzipAccepted = regexp.MustCompile(`(?i)(^|,)\s*gzip\s*(,|$|;\s*q=(1|0\.0*[1-9]))`)

// begin sends the header of an answer whose first bytes are first.
func (w *response) begin(status int, contentType string, first []byte) {
	header := w.Header()
	header.Set("Content-Type", contentType)
	header.Set("Vary", "Accept, Accept-Encoding")
	if len(first) > onePacket && gzipAccepted.MatchString(w.accepts) {
		header.Set("Content-Encoding", "gzip")
		w.zip, _ = gzip.NewWriterLevel(w.ResponseWriter, gzip.BestSpeed) // it fails on an unknown level only
	}
	w.status = status
	w.WriteHeader(status)
}

func (w *response) Write(b []byte) (int, error) {
	if w.zip != nil {
		return w.zip.Write(b)
	}
	return w.ResponseWriter.Write(b)
}

func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter } // for http.ResponseController

// ServeHTTP answers and logs one request. A response that fails after it began breaks the connection: it is not complete.
func (s *server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	begin := time.Now()
	w := &response{ResponseWriter: rw, accepts: r.Header.Get("Accept-Encoding")}
	c, err := s.serve(w, r)
	e := explain(r, err)
	broken := err != nil && w.status != 0
	if err != nil && !broken {
		sendError(w, e)
	}
	level := slog.LevelInfo
	if w.status >= 500 || broken {
		level = slog.LevelError
	}
	s.log.Log(r.Context(), level, "request", "method", r.Method, "path", r.URL.Path, "status", w.status, "broken", broken,
		"reason", cmp.Or(e.reason, e.message), "remote", r.RemoteAddr, "tenant", c.tenant, "key_id", c.keyID,
		"duration", time.Since(begin).Round(time.Microsecond))
	if broken {
		panic(http.ErrAbortHandler)
	}
}

// serve is the only way to a handler: it authenticates, then looks whether the path exists, then checks access.
func (s *server) serve(w *response, r *http.Request) (c Caller, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	otherwise, pattern := s.mux.Handler(r)
	rt, known := s.routes[pattern]
	if rt.access != open {
		if c, err = s.auth.authenticate(r); err != nil {
			return c, err
		}
	}
	if !known {
		otherwise.ServeHTTP(headerOnly{w}, r)
		if methods := w.Header().Get("Allow"); methods != "" {
			return c, refusal(http.StatusMethodNotAllowed, "This path takes %s.", methods)
		}
		return c, notFound("There is nothing at this path.")
	}
	if rt.access == needsWrite && c.readOnly {
		return c, refusal(http.StatusForbidden, "This API key is read-only.")
	}
	do, err := rt.handle(w, r, c)
	if err != nil {
		return c, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), cmp.Or(rt.limit, math.MaxInt64))
	defer cancel()
	result, err := do(ctx)
	if err == nil && result != nil {
		err = sendJSON(w, http.StatusOK, result)
	}
	if err == nil && w.zip != nil {
		err = w.zip.Close()
	}
	return c, err
}

// headerOnly keeps of ServeMux's own answer its header: it knows which methods a path takes.
type headerOnly struct{ http.ResponseWriter }

func (headerOnly) WriteHeader(int)             {}
func (headerOnly) Write(b []byte) (int, error) { return len(b), nil }

// explain turns any error into what the client may know of it, keeping the cause for the log.
func explain(r *http.Request, err error) *apiError {
	e, said := errors.AsType[*apiError](err)
	_, tooLarge := errors.AsType[*http.MaxBytesError](err)
	switch {
	case err == nil:
		return &apiError{}
	case said:
		return e
	case tooLarge:
		return &apiError{http.StatusRequestEntityTooLarge, fmt.Sprintf("The body is larger than %d bytes.", maxBody), ""}
	case r.Context().Err() != nil:
		return &apiError{http.StatusServiceUnavailable, "The request was abandoned.", "client gone: " + err.Error()}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &apiError{http.StatusRequestTimeout, "The body did not arrive in time.", ""}
	case unavailable(err):
		return &apiError{http.StatusServiceUnavailable, "The database is not available.", err.Error()}
	}
	return &apiError{http.StatusInternalServerError, "Internal server error.", err.Error()}
}

func sendError(w *response, e *apiError) {
	if e.status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", "ApiKey")
	}
	if e.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	_ = sendJSON(w, e.status, map[string]string{"detail": e.message}) // it fails only when the client is gone
}

func sendJSON(w *response, status int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.begin(status, "application/json", body)
	_, err = w.Write(append(body, '\n'))
	return err
}

// readJSON reads the body, bounded, and the query string of a request.
func readJSON(w http.ResponseWriter, r *http.Request, c Caller, digest io.Writer, f fields) error {
	kind, options, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || kind != "application/json" || !strings.EqualFold(cmp.Or(options["charset"], "utf-8"), "utf-8") {
		return refusal(http.StatusUnsupportedMediaType, "Content-Type: expected application/json in UTF-8.")
	}
	if encoding := r.Header.Get("Content-Encoding"); encoding != "" && encoding != "identity" {
		return refusal(http.StatusUnsupportedMediaType, "Content-Encoding: expected none.")
	}
	body := io.TeeReader(http.MaxBytesReader(w, r.Body, maxBody), digest)
	return cmp.Or(f.decodeJSON(body), fields{}.decodeQuery(r, c))
}

// fullReader fills p, because json.Decoder scans white space anew from its beginning after every small packet.
type fullReader struct{ io.Reader }

func (f fullReader) Read(p []byte) (int, error) {
	n, err := io.ReadFull(f.Reader, p)
	if n > 0 && err == io.ErrUnexpectedEOF {
		err = nil // the next call meets it again
	}
	return n, err
}

// fields says where the members of a request object or query parameters go: name to pointer.
// What is not given keeps its value. In place of the pointer an eachElement takes an array, and an eachValue a parameter
// that may be repeated: it makes the next place.
type fields map[string]any

type eachValue func() any

// eachElement decodes one element of an array, so that one at a time is held. Its errors name members of the element.
type eachElement func(dec *json.Decoder) error

// eachRow decodes into a copy of empty, which take gets.
func eachRow[T any](empty T, take func(*T) error) eachElement {
	return func(dec *json.Decoder) error {
		row := empty
		if err := dec.Decode(&row); err != nil {
			return err
		}
		return take(&row)
	}
}

// decodeJSON reads one JSON object and no more. Unlike encoding/json it refuses a member given twice or in another case.
func (f fields) decodeJSON(body io.Reader) error {
	dec := json.NewDecoder(fullReader{body})
	dec.DisallowUnknownFields()
	err := walk(dec, '{', func(int) error {
		token, err := dec.Token()
		if err != nil {
			return err
		}
		name := token.(string) // inside an object Token returns a member's name here, or an error
		into := f[name]
		delete(f, name)
		switch into := into.(type) {
		case nil:
			return invalid("%s: unknown field, or given twice", name)
		case eachElement:
			return inputError(name, walk(dec, '[', func(i int) error {
				err := into(dec)
				if e, ok := errors.AsType[*apiError](err); ok {
					return refusal(e.status, "%s[%d].%s", name, i, e.message)
				} else if err != nil {
					return inputError(fmt.Sprintf("%s[%d]", name, i), err)
				}
				return nil
			}))
		}
		return inputError(name, dec.Decode(into))
	})
	if err == nil {
		if _, err = dec.Token(); err == io.EOF {
			return nil
		}
		err = cmp.Or(err, errors.New("expected nothing after the object"))
	}
	return inputError("body", err)
}

// walk reads an object or array from its opening brace or bracket to the closing one; item has to read each member.
func walk(dec *json.Decoder, opening json.Delim, item func(i int) error) error {
	token, err := dec.Token()
	if err == nil && token != opening {
		err = fmt.Errorf("expected %s", opening)
	}
	for i := 0; err == nil && dec.More(); i++ {
		err = item(i)
	}
	if err == nil {
		_, err = dec.Token()
	}
	return err
}

// inWords turns Go's name of a field or type into the contract's.
var inWords = strings.NewReplacer("valueRow.", "", "*", "", "main.micros", "ISO 8601 timestamp of the years 1677 to 2262",
	"main.span", "duration such as PT36H, P1D or 90m", "main.number", "finite number or null", "main.uuid", "UUID",
	"main.label", "text of 1 to 500 bytes without control characters", "main.prose", "text of at most 10,000 bytes",
	"main.uploadRow", "object", "main.valueUpdate", "object", "bool", "true or false", "int64", "whole number of at least 1")

// inputError says what is wrong with the input at field. What says so already, or is not the input's fault, passes.
func inputError(field string, err error) error {
	_, said := errors.AsType[*apiError](err)
	_, tooLarge := errors.AsType[*http.MaxBytesError](err)
	if err == nil || said || tooLarge || errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		field = strings.TrimSuffix(field+"."+inWords.Replace(e.Field), ".")
		return invalid("%s: expected %s, not %.40s", field, inWords.Replace(e.Type.String()), e.Value)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return invalid("%s: the input ends too early", field)
	}
	return invalid("%s: %s", field, strings.TrimPrefix(err.Error(), "json: "))
}

// decodeQuery reads the query parameters. One that is unknown is refused: a misspelt filter must never widen an answer.
func (f fields) decodeQuery(r *http.Request, c Caller) error {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return invalid("the query string cannot be parsed")
	}
	var tenant uuid
	f["tenant_id"] = &tenant
	for name, values := range query {
		into := f[name]
		list, isList := into.(eachValue)
		if into == nil || len(values) > 1 && !isList {
			return invalid("%s: unknown parameter, or given twice", name)
		}
		for _, value := range values {
			if isList {
				into = list()
			}
			if err := setField(into, value); err != nil {
				return inputError(name, err)
			}
		}
	}
	return checkTenant(c, tenant)
}

// setField parses the text of a query parameter into what the pointer points to.
func setField(into any, text string) (err error) {
	switch into := into.(type) {
	case encoding.TextUnmarshaler:
		return into.UnmarshalText([]byte(text))
	case *string:
		*into = text
	case *bool:
		if *into, err = strconv.ParseBool(text); err != nil {
			return expected[bool]([]byte(text))
		}
	case *int64:
		if *into, err = strconv.ParseInt(text, 10, 64); err != nil || *into < 1 {
			return expected[int64]([]byte(text))
		}
	}
	return nil
}

// checkRange refuses a range of valid or known times that nothing can lie in.
func checkRange(times string, start, end micros) error {
	if end == 0 || end > start {
		return nil
	}
	return invalid("end_%[1]s: expected a time after start_%[1]s", times)
}

// checkTenant refuses a tenant_id that is not the caller's: it never changes whom a request acts for.
func checkTenant(c Caller, id uuid) error {
	if id == "" || string(id) == c.tenant {
		return nil
	}
	return refusal(http.StatusForbidden, "tenant_id is not the tenant of this API key.")
}

func (s *server) getRoot(*response, *http.Request, Caller) (work, error) {
	endpoints := map[string]access{}
	for _, rt := range s.table() {
		endpoints[strings.TrimSuffix(rt.pattern, "{$}")] = rt.access
	}
	return func(context.Context) (any, error) {
		return map[string]any{"name": "TimeDB API", "version": versionOf(), "endpoints": endpoints,
			"description": "Versioned time series: what was known of each moment, and when.",
			"authentication": map[string]string{"method": "API key", "header": "X-API-Key",
				"note": "Once users exist, every route that holds data needs a key."},
			"admin_note": "Tables and users are managed with the timedb command line."}, nil
	}, nil
}

func (s *server) getHealth(*response, *http.Request, Caller) (work, error) {
	return func(ctx context.Context) (any, error) {
		_, err := s.store.relations(ctx)
		return map[string]string{"status": "ok"}, err
	}, nil
}

func (s *server) postSeries(w *response, r *http.Request, c Caller) (work, error) {
	name, unit, description := label(""), label(defaultUnit), prose("")
	err := readJSON(w, r, c, io.Discard, fields{"name": &name, "description": &description, "unit": &unit})
	if err == nil && name == "" {
		err = invalid("name is required")
	}
	return func(ctx context.Context) (any, error) {
		id, created, err := s.store.CreateSeries(ctx, c, name, unit, description)
		message := map[bool]string{true: "Series created successfully", false: "Series already exists"}[created]
		return map[string]string{"series_id": id, "message": message}, err
	}, err
}

func (s *server) getSeries(_ *response, r *http.Request, c Caller) (work, error) {
	return func(ctx context.Context) (any, error) { return s.store.SeriesByID(ctx, c) }, fields{}.decodeQuery(r, c)
}

func (s *server) getRuns(_ *response, r *http.Request, c Caller) (work, error) {
	workflow, start, end, limit := label(""), micros(0), micros(0), int64(1000)
	err := fields{"workflow_id": &workflow, "start_known": &start, "end_known": &end, "limit": &limit}.decodeQuery(r, c)
	if err = cmp.Or(err, checkRange("known", start, end)); err == nil && limit > maxRuns {
		err = invalid("limit: expected at most %d", maxRuns)
	}
	return func(ctx context.Context) (any, error) { return s.store.Runs(ctx, c, workflow, start, end, limit) }, err
}

// valueRow is what one of value_rows and one of updates have in common.
type valueRow struct {
	ValidTime    micros `json:"valid_time"`
	ValidTimeEnd micros `json:"valid_time_end"`
	SeriesID     uuid   `json:"series_id,omitempty"`
	Value        number `json:"value,omitzero"`
}

var emptyRow = valueRow{Value: notGiven}

// check says what is missing of the row, or contradicts; key, in the member keyField, is the other way to name its series.
func (row *valueRow) check(keyField string, key label) error {
	switch {
	case row.ValidTime == 0:
		return invalid("valid_time is required")
	case row.ValidTimeEnd != 0 && row.ValidTimeEnd <= row.ValidTime:
		return invalid("valid_time_end: expected a time after valid_time")
	case row.SeriesID == "" && key == "":
		return invalid("%s or series_id is required", keyField)
	}
	return nil
}

// uploadRow is one of value_rows.
type uploadRow struct {
	valueRow
	ValueKey label `json:"value_key"`
}

// add checks a row and takes it. seen tells where in u.series a series stands.
func (u *upload) add(seen map[seriesRef]int, row *uploadRow) error {
	if row.Value == notGiven {
		return invalid("value is required (a number or null)")
	}
	if err := row.check("value_key", row.ValueKey); err != nil {
		return err
	}
	ref := seriesRef{ID: row.SeriesID, Key: row.ValueKey}
	i, known := seen[ref]
	if !known {
		i = len(u.series)
		seen[ref] = i
		u.series = append(u.series, ref)
		u.points = append(u.points, nil)
	}
	u.points[i] = append(u.points[i], point{row.ValidTime, row.ValidTimeEnd, float64(row.Value)})
	u.rows++
	return nil
}

func (s *server) postUpload(w *response, r *http.Request, c Caller) (work, error) {
	u, seen := &upload{workflowID: "api-workflow", series: []seriesRef{}}, map[seriesRef]int{}
	digest, tenant := sha256.New(), uuid("")
	rows := eachRow(uploadRow{valueRow: emptyRow}, func(row *uploadRow) error { return u.add(seen, row) })
	err := readJSON(w, r, c, digest, fields{"run_id": &u.runID, "workflow_id": &u.workflowID, "run_start_time": &u.start,
		"run_finish_time": &u.finish, "known_time": &u.known, "run_params": &u.params, "tenant_id": &tenant,
		"series_descriptions": &u.descriptions, "value_rows": rows})
	digest.Sum(u.digest[:0])
	return func(ctx context.Context) (any, error) {
		ids, err := s.store.Upload(ctx, c, u)
		return map[string]any{"run_id": u.runID, "message": "Run created successfully", "series_ids": ids, "rows_inserted": u.rows}, err
	}, cmp.Or(err, checkTenant(c, tenant), checkRun(u))
}

// checkRun checks what is not a row.
func checkRun(u *upload) error {
	if string(u.params) == "null" {
		u.params = nil
	}
	switch {
	case u.start == 0:
		return invalid("run_start_time is required")
	case u.finish != 0 && u.finish < u.start:
		return invalid("run_finish_time: expected a time not before run_start_time")
	case u.params != nil && (u.params[0] != '{' || len(u.params) > maxParams || !utf8.Valid(u.params)):
		return invalid("run_params: expected a JSON object of at most %d bytes in UTF-8", maxParams)
	}
	named := map[label]bool{}
	for _, ref := range u.series {
		named[ref.Key] = true
	}
	for key := range u.descriptions {
		if !named[key] {
			return invalid("series_descriptions: no row has the value_key %q", key)
		}
	}
	return nil
}

// optional is a member of which null differs from "not given": null is the zero value, given.
type optional[T any] struct {
	given bool
	value T
}

func (o optional[T]) IsZero() bool                 { return !o.given }
func (o optional[T]) MarshalJSON() ([]byte, error) { return json.Marshal(o.value) }

func (o *optional[T]) UnmarshalJSON(b []byte) error {
	o.given = true
	return json.Unmarshal(b, &o.value)
}

// check says what is missing of an update, or contradicts, and brings its tags into the form in which they are stored.
func (u *valueUpdate) check(c Caller) error {
	for i, tag := range u.Tags.value {
		u.Tags.value[i] = label(strings.ToLower(strings.TrimSpace(string(tag))))
	}
	slices.Sort(u.Tags.value)
	u.Tags.value = slices.Compact(u.Tags.value)
	if u.Value == notGiven && !u.Annotation.given && !u.Tags.given {
		return invalid("value, annotation or tags is required")
	}
	return cmp.Or(u.valueRow.check("series_key", u.SeriesKey), checkTenant(c, u.TenantID))
}

func (s *server) putValues(w *response, r *http.Request, c Caller) (work, error) {
	updates := []valueUpdate{}
	err := readJSON(w, r, c, io.Discard, fields{"updates": eachRow(valueUpdate{valueRow: emptyRow}, func(u *valueUpdate) error {
		if len(updates) == maxUpdates {
			return invalid("expected at most %d updates", maxUpdates)
		}
		err := u.check(c)
		updates = append(updates, *u)
		return err
	})})
	return func(ctx context.Context) (any, error) { return s.store.UpdateValues(ctx, c, updates) }, err
}

func (s *server) getValues(w *response, r *http.Request, c Caller) (work, error) {
	q := readQuery{lead: anyLead}
	out := &rowWriter{w: w}
	mode, format := "flat", "json"
	if strings.Contains(r.Header.Get("Accept"), "text/csv") {
		format = "csv"
	}
	err := fields{"start_valid": &q.start, "end_valid": &q.end, "start_known": &q.startKnown, "end_known": &q.endKnown,
		"mode": &mode, "all_versions": &q.allVersions,
		"series_id": eachValue(func() any { return &q.next().ID }), "series_key": eachValue(func() any { return &q.next().Key }),
		"as_of": &q.asOf, "lead": &q.lead,
		"detail": &out.detail, "limit": &out.limit, "format": &format}.decodeQuery(r, c)
	out.csv, out.overlapping, out.detail = format == "csv", mode == "overlapping", out.detail || q.allVersions
	q.overlapping = out.overlapping
	return func(ctx context.Context) (any, error) {
		out.start()
		if err := s.store.Read(ctx, c, q, out.row); err != nil && err != errEnough {
			return nil, err
		}
		return nil, out.finish()
	}, cmp.Or(err, checkRead(q, mode, format))
}

// checkRead refuses parameters that cannot be meant, or not together.
func checkRead(q readQuery, mode, format string) error {
	switch {
	case mode != "flat" && mode != "overlapping":
		return invalid("mode: expected flat or overlapping")
	case format != "json" && format != "csv":
		return invalid("format: expected json or csv")
	}
	return cmp.Or(checkRange("valid", q.start, q.end), checkRange("known", q.startKnown, q.endKnown))
}

// rowWriter streams values as JSON or CSV. What fails before flushBytes are full was not sent yet, and gets a proper status.
type rowWriter struct {
	w                        *response
	limit                    int64 // 0: none
	csv, overlapping, detail bool
	quote, null              string // around a time or id; for NULL
	buf                      []byte
	count                    int64
	series                   *series // of the last row, and what stands around its values
	before, after            []byte
}

// errEnough ends a read whose limit is reached.
var errEnough = errors.New("limit reached")

// start writes what stands before the rows.
func (o *rowWriter) start() {
	if !o.csv {
		o.quote, o.null, o.buf = `"`, "null", []byte(`{"data":[`)
		return
	}
	names := "valid_time,series_id,value,series_key,series_unit,valid_time_end"
	if o.detail {
		names = strings.Replace(names, "valid_time_end", "run_id,known_time,valid_time_end", 1) +
			",change_time,changed_by,annotation,tags,version"
	}
	if o.overlapping {
		names = "known_time," + strings.Replace(names, ",known_time", "", 1)
	}
	o.buf = []byte(names)
}

// row writes one row; the limit-th returns errEnough.
func (o *rowWriter) row(x *series, e *element) error {
	if x != o.series {
		o.series = x
		o.before = o.name(append(o.name(nil, "series_id"), o.quote+x.ID+o.quote...), "value")
		o.after = o.text(o.text(nil, "series_key", x.Key), "series_unit", x.Unit)
	}
	b := o.buf
	if o.count > 0 && !o.csv {
		b = append(b, ',')
	}
	first := len(b)
	if o.overlapping {
		b = o.time(b, "known_time", e.from.Known)
	}
	b = append(o.time(b, "valid_time", e.time), o.before...)
	if !o.csv || !math.IsNaN(e.value) {
		b = appendNumber(b, e.value)
	}
	b = append(b, o.after...)
	if o.detail {
		b = o.text(b, "run_id", e.from.RunID)
	}
	if o.detail && !o.overlapping {
		b = o.time(b, "known_time", e.from.Known)
	}
	if o.detail || o.csv || e.end != 0 { // rows of a CSV cannot differ
		b = o.time(b, "valid_time_end", e.end)
	}
	if o.detail {
		b = o.text(o.time(b, "change_time", e.from.Change), "changed_by", e.from.ChangedBy)
		b = o.text(o.text(b, "annotation", e.from.Annotation), "tags", e.from.Tags)
		b = strconv.AppendInt(o.name(b, "version"), int64(e.from.Number), 10)
	}
	if o.csv { // what begins the row takes the place of its first comma
		b[first] = '\n'
	} else {
		b[first] = '{'
		b = append(b, '}')
	}
	o.buf = b
	if o.count++; len(o.buf) >= flushBytes {
		if err := o.flush(); err != nil {
			return err
		}
	}
	if o.count == o.limit {
		return errEnough
	}
	return nil
}

// name begins a cell, whose name is its place in a CSV.
func (o *rowWriter) name(b []byte, name string) []byte {
	if b = append(b, ','); o.csv {
		return b
	}
	return append(append(append(b, '"'), name...), `":`...)
}

// time writes a cell; no time is NULL.
func (o *rowWriter) time(b []byte, name string, t micros) []byte {
	if b = o.name(b, name); t == 0 {
		return append(b, o.null...)
	}
	return append(t.append(append(b, o.quote...)), o.quote...)
}

// text writes a cell that holds a string, or a list of strings, which in a CSV stays JSON.
func (o *rowWriter) text(b []byte, name string, v any) []byte {
	text, _ := json.Marshal(v) // strings always marshal
	b = o.name(b, name)
	switch {
	case string(text) == "null":
		return append(b, o.null...)
	case !o.csv:
		return append(b, text...)
	}
	cell := string(text)
	_ = json.Unmarshal(text, &cell) // a list stays as it is
	return append(b, `"`+strings.ReplaceAll(cell, `"`, `""`)+`"`...)
}

// flush sends what is buffered, and gives the reader a new writeTimeout for it.
func (o *rowWriter) flush() error {
	if o.w.status == 0 {
		o.w.begin(http.StatusOK, map[bool]string{true: "text/csv; charset=utf-8", false: "application/json"}[o.csv], o.buf)
	}
	if err := http.NewResponseController(o.w).SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err := o.w.Write(o.buf)
	o.buf = o.buf[:0]
	return err
}

// finish ends a complete response.
func (o *rowWriter) finish() error {
	if o.csv {
		o.buf = append(o.buf, '\n')
	} else {
		o.buf = fmt.Appendf(o.buf, "],\"count\":%d}\n", o.count)
	}
	return o.flush()
}

// ---- Types of values in requests. They know what they accept, wherever it stands: JSON, query, CSV or command line.

// expected is the error for a text that is no T, in the form that lets encoding/json add the field's name.
func expected[T any](text []byte) error {
	return &json.UnmarshalTypeError{Value: string(text), Type: reflect.TypeFor[T]()}
}

// micros counts microseconds since the first day of year 1 in UTC, where a time.Time begins too. Zero is no time: "not
// given", NULL.
type micros int64

const (
	unixEpoch = micros(62_135_596_800e6)
	pgEpoch   = micros(63_082_281_600e6) // of a timestamptz on the wire: 2000-01-01
	firstTime = micros(52_889_500_800e6) // the years that there are: 1677
	lastTime  = micros(71_381_779_200e6) // to 2262
)

func (m micros) utc() time.Time { return time.UnixMicro(int64(m - unixEpoch)).UTC() }

// append writes m as the API does: in UTC, with six digits of fraction or none.
func (m micros) append(b []byte) []byte {
	seconds := len(b) + len("2006-01-02T15:04:05")
	b = m.utc().AppendFormat(b, time.RFC3339Nano) // much faster than a layout of our own
	b = b[:len(b)-1]                              // the Z
	for len(b) > seconds && len(b) < seconds+len(".000000") {
		b = append(b, '0')
	}
	return append(b, "+00:00"...)
}

func (m micros) String() string { return string(m.append(nil)) }

func (m micros) MarshalJSON() ([]byte, error) {
	if m == 0 {
		return []byte("null"), nil
	}
	return append(m.append([]byte{'"'}), '"'), nil
}

// Value is m as a bound argument.
func (m micros) Value() (driver.Value, error) {
	if m == 0 {
		return nil, nil
	}
	return m.utc(), nil
}

var timeLayouts = []string{time.RFC3339, "2006-01-02T15:04:05", "2006-01-02", "2006-01-02T15:04Z07:00", "2006-01-02T15:04",
	"2006-01-02T15:04:05Z0700", "2006-01-02T15:04:05Z07", "2006-01-02T15:04Z0700", "2006-01-02T15:04Z07"}

// UnmarshalText reads an ISO 8601 timestamp: a date, or date and time with T or a space between; no offset means UTC. A
// plus that a query string turned into a space is understood. Digits beyond microseconds are cut off.
func (m *micros) UnmarshalText(text []byte) error {
	s := string(text)
	if len(s) > 10 && s[10] == ' ' {
		s = s[:10] + "T" + s[11:]
	}
	s = strings.Replace(s, " ", "+", 1)
	for _, layout := range timeLayouts {
		t, err := time.Parse(layout, s)
		*m = unixEpoch + micros(t.UnixMicro())
		if err == nil && *m >= firstTime && *m < lastTime && (len(s) <= 13 || s[13] == ':') { // time.Parse takes an hour of one digit
			return nil
		}
	}
	return expected[micros](text)
}

// span is a duration of less than 274 years, as ISO 8601 (P1DT12H; no months or years, whose length differs) or as Go
// writes it (36h). What is finer than a microsecond is cut off.
type span time.Duration

var isoSpan = regexp.MustCompile(`^P(?:(\d{1,5})W)?(?:(\d{1,6})D)?(?:T([0-9.HMS]+))?$`)

func (d *span) UnmarshalText(text []byte) error {
	s, days := string(text), 0
	if m := isoSpan.FindStringSubmatch(s); m != nil && len(s) > 1 {
		weeks, _ := strconv.Atoi(m[1]) // digits or nothing
		days, _ = strconv.Atoi(m[2])
		days += 7 * weeks
		s = cmp.Or(strings.ToLower(m[3]), "0s")
	}
	clock, err := time.ParseDuration(s)
	clock += time.Duration(days) * 24 * time.Hour
	if *d = span(clock.Truncate(time.Microsecond)); err != nil || *d < 0 || days > 100_000 {
		return expected[span](text)
	}
	return nil
}

func (d span) micros() micros { return micros(d / span(time.Microsecond)) }

// uuid is in lower case.
type uuid string

var uuidPattern = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

func (u *uuid) UnmarshalText(text []byte) error {
	if *u = uuid(strings.ToLower(string(text))); !uuidPattern.MatchString(string(*u)) {
		return expected[uuid](text)
	}
	return nil
}

// label is a key, unit, workflow_id, e-mail address or tag; PostgreSQL indexes keys up to some 2,700 bytes.
type label string

func (l *label) UnmarshalText(text []byte) error {
	*l = label(text)
	if len(text) > 500 || len(bytes.TrimSpace(text)) == 0 || bytes.ContainsFunc(text, unprintable) {
		return expected[label](text)
	}
	return nil
}

// unprintable is true of control characters and of what stands for bytes that are not UTF-8.
func unprintable(r rune) bool { return r == utf8.RuneError || unicode.IsControl(r) }

// prose is a description or annotation, without white space around it.
type prose string

func (p *prose) UnmarshalText(text []byte) error {
	*p = prose(bytes.TrimSpace(text))
	if len(text) > 10_000 || bytes.ContainsFunc(text, func(r rune) bool { return unprintable(r) && !strings.ContainsRune("\t\r\n", r) }) {
		return expected[prose](text)
	}
	return nil
}

// number is a value: any float64 but infinity, or NULL, which is NaN.
type number float64

var notGiven = number(math.Inf(1))

func (n number) IsZero() bool                 { return n == notGiven }
func (n number) MarshalJSON() ([]byte, error) { return appendNumber(nil, float64(n)), nil }

func (n *number) UnmarshalJSON(b []byte) error {
	return n.UnmarshalText(bytes.TrimPrefix(b, []byte("null")))
}

// UnmarshalText takes nothing and NaN for NULL.
func (n *number) UnmarshalText(text []byte) error {
	f, err := math.NaN(), error(nil)
	if s := string(text); s != "" && s != "NaN" {
		f, err = strconv.ParseFloat(s, 64)
		if err != nil || math.IsInf(f, 0) || math.IsNaN(f) || strings.ContainsAny(s, "xX") { // no hexadecimal
			return expected[number](text)
		}
	}
	*n = number(f)
	return nil
}

// appendNumber writes f so that it reads as a float: 20.0, not 20. NaN is null.
func appendNumber(b []byte, f float64) []byte {
	n := len(b)
	abs := math.Abs(f)
	switch {
	case math.IsNaN(f):
		return append(b, "null"...)
	case abs != 0 && (abs < 1e-4 || abs >= 1e16):
		return strconv.AppendFloat(b, f, 'e', -1, 64)
	}
	if b = strconv.AppendFloat(b, f, 'f', -1, 64); !bytes.ContainsRune(b[n:], '.') {
		b = append(b, '.', '0')
	}
	return b
}
