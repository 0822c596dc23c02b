package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"database/sql/driver"
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
	maxText    = 500      // bytes of a key, unit, workflow_id or tag; PostgreSQL indexes keys up to some 2,700
	maxProse   = 10_000   // bytes of a description or annotation
	maxParams  = 16 << 10

	flushBytes = 64 << 10 // of a stream at a time

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

// route is one line of the route table. What handle returns is sent as JSON, unless it is nil: then it was sent already.
type route struct {
	pattern string
	access  access
	handle  func(w http.ResponseWriter, r *http.Request, c Caller) (any, error)
}

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
		{"GET /{$}", open, s.getRoot},
		{"GET /healthz", open, s.getHealth},
		{"POST /upload", needsWrite, s.postUpload},
		{"GET /values", needsRead, s.getValues},
		{"PUT /values", needsWrite, s.putValues},
		{"POST /series", needsWrite, s.postSeries},
		{"GET /list_timeseries", needsRead, s.getSeries},
	}
}

func newServer(st *store, auth *authenticator, log *slog.Logger) *server {
	s := &server{st, auth, log, http.NewServeMux(), map[string]route{}}
	allowed := map[string][]string{}
	for _, rt := range s.table() {
		method, path, _ := strings.Cut(rt.pattern, " ")
		allowed[path] = append(allowed[path], strings.Replace(method, "GET", "GET, HEAD", 1))
		s.routes[rt.pattern] = rt
		s.routes[path] = route{path, needsRead, func(w http.ResponseWriter, _ *http.Request, _ Caller) (any, error) {
			methods := strings.Join(allowed[path], ", ")
			w.Header().Set("Allow", methods)
			return nil, refusal(http.StatusMethodNotAllowed, "This path takes %s.", methods)
		}}
	}
	for pattern := range s.routes {
		s.mux.Handle(pattern, http.NotFoundHandler())
	}
	return s
}

// recorder remembers what was answered.
type recorder struct {
	http.ResponseWriter
	status int // 0: nothing was sent yet
}

func (w *recorder) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *recorder) Write(b []byte) (int, error) {
	w.status = cmp.Or(w.status, http.StatusOK)
	return w.ResponseWriter.Write(b)
}

func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter } // for http.ResponseController

// ServeHTTP answers and logs one request. A response that fails after it began breaks the connection: it is not complete.
func (s *server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	begin := time.Now()
	w := &recorder{ResponseWriter: rw}
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
func (s *server) serve(w *recorder, r *http.Request) (c Caller, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_, pattern := s.mux.Handler(r)
	rt, known := s.routes[pattern]
	if rt.access != open {
		if c, err = s.auth.authenticate(r); err != nil {
			return c, err
		}
	}
	if !known {
		return c, notFound("There is nothing at this path.")
	}
	if rt.access == needsWrite && c.readOnly {
		return c, refusal(http.StatusForbidden, "This API key is read-only.")
	}
	result, err := rt.handle(w, r, c)
	if err == nil && result != nil {
		err = sendJSON(w, http.StatusOK, result)
	}
	return c, err
}

// explain turns any error into what the client may know of it, keeping the cause for the log.
func explain(r *http.Request, err error) *apiError {
	var e *apiError
	var tooLarge *http.MaxBytesError
	switch {
	case err == nil:
		return &apiError{}
	case errors.As(err, &e):
		return e
	case errors.As(err, &tooLarge):
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

func sendError(w http.ResponseWriter, e *apiError) {
	if e.status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", "ApiKey")
	}
	if e.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	_ = sendJSON(w, e.status, map[string]string{"detail": e.message}) // it fails only when the client is gone
}

func sendJSON(w http.ResponseWriter, status int, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(body)+1))
	w.WriteHeader(status)
	_, err = w.Write(append(body, '\n'))
	return err
}

// useDatabase runs fn for requestTimeout at most. A request that was found wanting (err) is refused here.
func useDatabase(r *http.Request, err error, fn func(ctx context.Context) (any, error)) (any, error) {
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	return fn(ctx)
}

// readJSON reads the body, bounded, and the query string of a request that takes nothing but JSON.
func (s *server) readJSON(w http.ResponseWriter, r *http.Request, c Caller, digest io.Writer, f fields) error {
	kind, options, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || kind != "application/json" || !strings.EqualFold(cmp.Or(options["charset"], "utf-8"), "utf-8") {
		return refusal(http.StatusUnsupportedMediaType, "Content-Type: expected application/json in UTF-8.")
	}
	if encoding := r.Header.Get("Content-Encoding"); encoding != "" && encoding != "identity" {
		return refusal(http.StatusUnsupportedMediaType, "Content-Encoding: expected none.")
	}
	if r.ContentLength > maxBody {
		return &http.MaxBytesError{Limit: maxBody}
	}
	if err := f.decodeJSON(fullReader{io.TeeReader(http.MaxBytesReader(w, r.Body, maxBody), digest)}); err != nil {
		return err
	}
	return fields{}.decodeQuery(r, c)
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

// fields says where the members of a request object, or its query parameters, go: name to pointer.
// What is not given keeps its value. An eachElement in place of the pointer takes an array.
type fields map[string]any

// eachElement decodes one element of an array, so that one at a time is held; field is where it stands in the request.
type eachElement func(field string, dec *json.Decoder) error

// decodeJSON reads one JSON object and no more. Unlike encoding/json it refuses a member given twice or in another case.
func (f fields) decodeJSON(body io.Reader) error {
	dec := json.NewDecoder(body)
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
				field := name + "[" + strconv.Itoa(i) + "]"
				return inputError(field, into(field, dec))
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
	"main.number", "finite number or null", "main.uploadRow", "object", "main.updateRow", "object")

// inputError says what is wrong with the input at field. What says so already, or is not the input's fault, passes.
func inputError(field string, err error) error {
	var typeErr *json.UnmarshalTypeError
	var e *apiError
	var tooLarge *http.MaxBytesError
	switch {
	case err == nil, errors.As(err, &e), errors.As(err, &tooLarge), errors.Is(err, os.ErrDeadlineExceeded):
		return err
	case errors.As(err, &typeErr):
		field = strings.TrimSuffix(field+"."+inWords.Replace(typeErr.Field), ".")
		return invalid("%s: expected %s, not %.40s", field, inWords.Replace(typeErr.Type.String()), typeErr.Value)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
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
	var tenant string
	f["tenant_id"] = &tenant
	for name, values := range query {
		into := f[name]
		list, isList := into.(*[]string)
		switch {
		case into == nil:
			return invalid("%s: unknown parameter", name)
		case isList:
			*list = values
			continue
		case len(values) > 1:
			return invalid("%s: given twice", name)
		}
		if err := setField(name, into, values[0]); err != nil {
			return err
		}
	}
	return checkTenant(c, "tenant_id", tenant)
}

// setField parses the text of a query parameter into what the pointer points to.
func setField(field string, into any, text string) (err error) {
	switch into := into.(type) {
	case *string:
		*into = text
	case *micros:
		*into, err = parseTime(text)
	case *bool:
		if *into, err = strconv.ParseBool(text); err != nil {
			err = errors.New("expected true or false")
		}
	case *int64:
		if *into, err = strconv.ParseInt(text, 10, 64); err != nil || *into < 1 {
			err = errors.New("expected a whole number of at least 1")
		}
	}
	return inputError(field, err)
}

// checkText refuses what is blank, too long, not UTF-8, or holds control characters (but for line ends in prose).
func checkText(field, s string, limit int) error {
	bad := func(r rune) bool {
		return r == utf8.RuneError || unicode.IsControl(r) && (limit != maxProse || !strings.ContainsRune("\t\r\n", r))
	}
	switch {
	case strings.TrimSpace(s) == "":
		return invalid("%s: expected text that is not blank", field)
	case len(s) > limit || strings.ContainsFunc(s, bad):
		return invalid("%s: expected at most %d bytes of UTF-8 without control characters", field, limit)
	}
	return nil
}

var uuidPattern = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// checkUUID puts *s into lower case and returns an error unless it is a UUID in the usual form, or empty.
func checkUUID(field string, s *string) error {
	if *s = strings.ToLower(*s); *s != "" && !uuidPattern.MatchString(*s) {
		return invalid("%s: expected a UUID", field)
	}
	return nil
}

// checkTenant refuses a tenant_id that is not the caller's: it never changes whom a request acts for.
func checkTenant(c Caller, field, id string) error {
	if err := checkUUID(field, &id); err != nil || id == "" || id == c.tenant {
		return err
	}
	return refusal(http.StatusForbidden, "%s is not the tenant of this API key.", field)
}

func (s *server) getRoot(http.ResponseWriter, *http.Request, Caller) (any, error) {
	endpoints := map[string]access{}
	for _, rt := range s.table() {
		endpoints[strings.TrimSuffix(rt.pattern, "{$}")] = rt.access
	}
	return map[string]any{"name": "TimeDB API", "version": versionOf(), "endpoints": endpoints,
		"description": "Versioned time series: what was known of each moment, and when.",
		"authentication": map[string]string{"method": "API key", "header": "X-API-Key",
			"note": "Once users exist, every route that holds data needs a key."},
		"admin_note": "Tables and users are managed with the timedb command line."}, nil
}

func (s *server) getHealth(_ http.ResponseWriter, r *http.Request, _ Caller) (any, error) {
	ctx, cancel := context.WithTimeout(r.Context(), lookupTimeout)
	defer cancel()
	if _, err := s.store.relations(ctx); err != nil {
		return nil, &apiError{http.StatusServiceUnavailable, "The database is not available.", err.Error()}
	}
	return map[string]string{"status": "ok"}, nil
}

func (s *server) postSeries(w http.ResponseWriter, r *http.Request, c Caller) (any, error) {
	x := series{Unit: defaultUnit}
	err := s.readJSON(w, r, c, io.Discard, fields{"name": &x.Key, "description": &x.Description, "unit": &x.Unit})
	err = cmp.Or(err, checkText("name", x.Key, maxText), checkText("unit", x.Unit, maxText),
		checkText("description", cmp.Or(x.Description, "none"), maxProse))
	return useDatabase(r, err, func(ctx context.Context) (any, error) {
		id, created, err := s.store.CreateSeries(ctx, c, x)
		message := map[bool]string{true: "Series created successfully", false: "Series already exists"}[created]
		return map[string]string{"series_id": id, "message": message}, err
	})
}

func (s *server) getSeries(_ http.ResponseWriter, r *http.Request, c Caller) (any, error) {
	err := fields{}.decodeQuery(r, c)
	return useDatabase(r, err, func(ctx context.Context) (any, error) { return s.store.SeriesByID(ctx, c) })
}

// valueRow is what one of value_rows and one of updates have in common. emptyRow holds what no request can: "not given".
type valueRow struct {
	ValidTime    micros `json:"valid_time"`
	ValidTimeEnd micros `json:"valid_time_end"`
	SeriesID     string `json:"series_id"`
	Value        number `json:"value"`
}

var emptyRow = valueRow{ValidTime: noEnd, ValidTimeEnd: noEnd, Value: notGiven}

// check says what is wrong with the row apart from its value; key is the other way to name its series.
func (row *valueRow) check(field, keyField, key string) error {
	err := checkUUID(field+".series_id", &row.SeriesID)
	switch {
	case row.ValidTime == noEnd:
		return invalid("%s.valid_time is required", field)
	case row.ValidTimeEnd != noEnd && row.ValidTimeEnd <= row.ValidTime:
		return invalid("%s.valid_time_end: expected a time after valid_time", field)
	case err == nil && (row.SeriesID == "" || key != ""):
		return checkText(field+"."+keyField, key, maxText)
	}
	return err
}

// uploadRow is one of value_rows.
type uploadRow struct {
	valueRow
	ValueKey string `json:"value_key"`
}

// add checks a row and takes it; field is where it stands in the request.
func (u *upload) add(seen map[[2]string]int, field string, row *uploadRow) error {
	if row.Value == notGiven {
		return invalid("%s.value is required (a number or null)", field)
	}
	name := [2]string{row.SeriesID, row.ValueKey}
	i, known := seen[name]
	if !known || row.ValidTime == noEnd || row.ValidTimeEnd != noEnd { // the other checks hold for all rows of a series
		if err := row.check(field, "value_key", row.ValueKey); err != nil {
			return err
		}
	}
	if !known {
		i = len(u.series)
		seen[name] = i
		u.series = append(u.series, seriesRef{row.SeriesID, row.ValueKey, field})
		u.points = append(u.points, nil)
	}
	u.points[i] = append(u.points[i], point{row.ValidTime, row.ValidTimeEnd, float64(row.Value)})
	u.rows++
	return nil
}

func (s *server) postUpload(w http.ResponseWriter, r *http.Request, c Caller) (any, error) {
	u, tenant, digest := &upload{workflowID: "api-workflow"}, "", sha256.New()
	seen := map[[2]string]int{} // where in u.series a series_id and value_key stand
	rows := eachElement(func(field string, dec *json.Decoder) error {
		row := uploadRow{valueRow: emptyRow}
		if err := dec.Decode(&row); err != nil {
			return err
		}
		return u.add(seen, field, &row)
	})
	err := s.readJSON(w, r, c, digest, fields{"run_id": &u.runID, "workflow_id": &u.workflowID, "run_start_time": &u.start,
		"run_finish_time": &u.finish, "known_time": &u.known, "run_params": &u.params, "tenant_id": &tenant,
		"series_descriptions": &u.descriptions, "value_rows": rows})
	if err == nil {
		err = cmp.Or(checkTenant(c, "tenant_id", tenant), checkRun(u))
	}
	digest.Sum(u.digest[:0])
	return useDatabase(r, err, func(ctx context.Context) (any, error) {
		ids, err := s.store.Upload(ctx, c, u)
		return map[string]any{"run_id": u.runID, "message": "Run created successfully", "series_ids": ids, "rows_inserted": u.rows}, err
	})
}

// checkRun checks what is not a row.
func checkRun(u *upload) error {
	if string(u.params) == "null" {
		u.params = nil
	}
	switch {
	case u.start == nil:
		return invalid("run_start_time is required")
	case u.finish != nil && *u.finish < *u.start:
		return invalid("run_finish_time: expected a time not before run_start_time")
	case u.params != nil && (u.params[0] != '{' || len(u.params) > maxParams || !utf8.Valid(u.params)):
		return invalid("run_params: expected a JSON object of at most %d bytes in UTF-8", maxParams)
	}
	named := map[string]bool{}
	for _, ref := range u.series {
		named[ref.key] = true
	}
	for key, text := range u.descriptions {
		if !named[key] {
			return invalid("series_descriptions: no row has the value_key %q", key)
		}
		if err := checkText("series_descriptions."+key, text, maxProse); err != nil {
			return err
		}
	}
	return cmp.Or(checkText("workflow_id", u.workflowID, maxText), checkUUID("run_id", &u.runID))
}

// optional is a member of which null differs from "not given": null is the zero value, given.
type optional[T any] struct {
	given bool
	value T
}

func (o *optional[T]) UnmarshalJSON(b []byte) error {
	o.given = true
	return json.Unmarshal(b, &o.value)
}

// updateRow is one of updates.
type updateRow struct {
	valueRow
	SeriesKey  string             `json:"series_key"`
	RunID      string             `json:"run_id"`
	KnownTime  *micros            `json:"known_time"`
	TenantID   string             `json:"tenant_id"`
	Annotation optional[string]   `json:"annotation"`
	Tags       optional[[]string] `json:"tags"`
}

// decodeUpdate decodes and checks one update; field is where it stands in the request.
func decodeUpdate(c Caller, field string, dec *json.Decoder) (u valueUpdate, err error) {
	row := updateRow{valueRow: emptyRow}
	if err := dec.Decode(&row); err != nil {
		return u, err
	}
	err = cmp.Or(row.check(field, "series_key", row.SeriesKey), checkTenant(c, field+".tenant_id", row.TenantID),
		checkUUID(field+".run_id", &row.RunID))
	u = valueUpdate{seriesRef: seriesRef{row.SeriesID, row.SeriesKey, field}, Known: row.KnownTime, Time: row.ValidTime,
		End: row.ValidTimeEnd, SetValue: row.Value != notGiven, SetAnnotation: row.Annotation.given, SetTags: row.Tags.given}
	if row.RunID != "" {
		u.RunID = &row.RunID
	}
	if value := float64(row.Value); !math.IsNaN(value) && u.SetValue {
		u.Value = &value
	}
	if u.Annotation = strings.TrimSpace(row.Annotation.value); u.Annotation != "" {
		err = cmp.Or(err, checkText(field+".annotation", u.Annotation, maxProse))
	}
	for _, tag := range row.Tags.value {
		err = cmp.Or(err, checkText(field+".tags", tag, maxText))
		u.Tags = append(u.Tags, strings.ToLower(strings.TrimSpace(tag)))
	}
	slices.Sort(u.Tags)
	u.Tags = slices.Compact(u.Tags)
	if !u.SetValue && !u.SetAnnotation && !u.SetTags {
		err = cmp.Or(err, invalid("%s: value, annotation or tags is required", field))
	}
	return u, err
}

func (s *server) putValues(w http.ResponseWriter, r *http.Request, c Caller) (any, error) {
	updates := []valueUpdate{}
	err := s.readJSON(w, r, c, io.Discard, fields{"updates": eachElement(func(field string, dec *json.Decoder) error {
		u, err := decodeUpdate(c, field, dec)
		if updates = append(updates, u); len(updates) > maxUpdates {
			err = invalid("updates: expected at most %d", maxUpdates)
		}
		return err
	})})
	return useDatabase(r, err, func(ctx context.Context) (any, error) {
		updated, skipped, err := s.store.UpdateValues(ctx, c, updates)
		return map[string]any{"updated": updated, "skipped_no_ops": skipped}, err
	})
}

func (s *server) getValues(w http.ResponseWriter, r *http.Request, c Caller) (any, error) {
	q := readQuery{start: beginning, end: endOfTime, startKnown: beginning, endKnown: endOfTime, asOf: endOfTime}
	out := &rowWriter{w: w, buf: []byte(`{"data":[`)}
	mode := "flat"
	var ids, keys []string
	err := fields{"start_valid": &q.start, "end_valid": &q.end, "start_known": &q.startKnown, "end_known": &q.endKnown,
		"mode": &mode, "all_versions": &q.allVersions, "series_id": &ids, "series_key": &keys, "as_of": &q.asOf,
		"detail": &out.detail, "limit": &out.limit}.decodeQuery(r, c)
	for _, id := range ids {
		id = cmp.Or(id, "none") // an empty parameter must not select everything
		err = cmp.Or(err, checkUUID("series_id", &id))
		q.series = append(q.series, seriesRef{id: id, field: "series_id"})
	}
	for _, key := range keys {
		err = cmp.Or(err, checkText("series_key", key, maxText))
		q.series = append(q.series, seriesRef{key: key, field: "series_key"})
	}
	switch {
	case err != nil:
		return nil, err
	case mode != "flat" && mode != "overlapping":
		return nil, invalid("mode: expected flat or overlapping")
	case q.end <= q.start:
		return nil, invalid("end_valid: expected a time after start_valid")
	case q.endKnown <= q.startKnown:
		return nil, invalid("end_known: expected a time after start_known")
	}
	q.overlapping, out.overlapping, out.detail = mode == "overlapping", mode == "overlapping", out.detail || q.allVersions
	if err := s.store.Read(r.Context(), c, q, out.row); err != nil && err != errEnough {
		return nil, err
	}
	return nil, out.finish()
}

// rowWriter streams values as JSON. What fails before flushBytes are full was not sent yet, and gets a proper status.
type rowWriter struct {
	w                   http.ResponseWriter
	limit               int64 // 0: none
	overlapping, detail bool
	buf                 []byte
	count               int64
	series              *series // of the last row, and what stands around its values
	before, after       []byte
}

// errEnough ends a read whose limit is reached.
var errEnough = errors.New("limit reached")

// row writes one row; the limit-th returns errEnough.
func (o *rowWriter) row(x *series, e *element) error {
	if x != o.series {
		o.series = x
		o.before = append(append([]byte(`,"series_id":"`), x.ID...), `","value":`...)
		o.after = appendText(appendText(nil, "series_key", x.Key), "series_unit", x.Unit)
	}
	b := o.buf
	if o.count > 0 {
		b = append(b, ',')
	}
	b = append(b, '{')
	if o.overlapping {
		b = append(appendTime(b, "known_time", e.from.Known), ',')
	}
	b = appendTime(b, "valid_time", e.time)
	b = append(appendNumber(append(b, o.before...), e.value), o.after...)
	if o.detail {
		b = appendText(b, "run_id", e.from.RunID)
		if !o.overlapping {
			b = appendTime(append(b, ','), "known_time", e.from.Known)
		}
	}
	if o.detail || e.end != noEnd {
		b = appendTime(append(b, ','), "valid_time_end", e.end)
	}
	if o.detail {
		b = appendTime(append(b, ','), "change_time", e.from.Change)
		b = appendText(appendText(b, "changed_by", e.from.ChangedBy), "annotation", e.from.Annotation)
		b = appendText(appendText(b, "tags", e.from.Tags), "version", e.from.Number)
	}
	o.buf = append(b, '}')
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

// appendTime writes a field; noEnd is null.
func appendTime(b []byte, name string, t micros) []byte {
	b = append(append(append(b, '"'), name...), `":`...)
	if t == noEnd {
		return append(b, "null"...)
	}
	return append(t.append(append(b, '"')), '"')
}

// appendText writes a further field of any other kind.
func appendText(b []byte, name string, v any) []byte {
	text, _ := json.Marshal(v) // strings and integers always marshal
	return append(append(append(append(b, `,"`...), name...), `":`...), text...)
}

// flush sends what is buffered, and gives the reader a new writeTimeout for it.
func (o *rowWriter) flush() error {
	o.w.Header().Set("Content-Type", "application/json")
	if err := http.NewResponseController(o.w).SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err := o.w.Write(o.buf)
	o.buf = o.buf[:0]
	return err
}

// finish ends a complete response.
func (o *rowWriter) finish() error {
	o.buf = fmt.Appendf(o.buf, "],\"count\":%d}\n", o.count)
	return o.flush()
}

// micros counts microseconds since 2000-01-01 UTC, as a timestamptz of PostgreSQL does; its extremes are the infinities.
type micros int64

const (
	beginning = micros(math.MinInt64)
	endOfTime = micros(math.MaxInt64)

	// noEnd stands for the valid_time_end of a value at a moment. It sorts before every end, and is NULL outside.
	noEnd = beginning

	pgEpoch = 946_684_800 // 2000-01-01 UTC in Unix seconds
)

func (m micros) utc() time.Time { return time.UnixMicro(int64(m) + pgEpoch*1e6).UTC() }

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
	if m == noEnd {
		return []byte("null"), nil
	}
	return append(m.append([]byte{'"'}), '"'), nil
}

// UnmarshalText reports a bad text in the form that lets encoding/json add the field's name.
func (m *micros) UnmarshalText(text []byte) (err error) {
	if *m, err = parseTime(string(text)); err != nil {
		return &json.UnmarshalTypeError{Value: strconv.Quote(string(text)), Type: reflect.TypeFor[micros]()}
	}
	return nil
}

// Value and Scan are m as a bound argument and as a result.
func (m micros) Value() (driver.Value, error) {
	switch m {
	case beginning:
		return "-infinity", nil
	case endOfTime:
		return "infinity", nil
	}
	return m.utc(), nil
}

func (m *micros) Scan(src any) error {
	t, ok := src.(time.Time)
	if !ok {
		return fmt.Errorf("micros: cannot scan %T", src)
	}
	*m = micros(t.UnixMicro() - pgEpoch*1e6)
	return nil
}

var errBadTime = errors.New("expected an ISO 8601 timestamp of the years 1677 to 2262")

var timeLayouts = []string{time.RFC3339, "2006-01-02T15:04:05", "2006-01-02", "2006-01-02T15:04Z07:00", "2006-01-02T15:04",
	"2006-01-02T15:04:05Z0700", "2006-01-02T15:04:05Z07", "2006-01-02T15:04Z0700", "2006-01-02T15:04Z07"}

// parseTime reads an ISO 8601 timestamp: a date, or date and time with T or a space between; no offset means UTC. A plus
// that a query string turned into a space is understood. Digits beyond microseconds are cut off.
func parseTime(s string) (micros, error) {
	if len(s) > 10 && s[10] == ' ' {
		s = s[:10] + "T" + s[11:]
	}
	s = strings.Replace(s, " ", "+", 1)
	if len(s) > 13 && s[13] != ':' {
		return 0, errBadTime // time.Parse takes an hour of one digit
	}
	for _, layout := range timeLayouts {
		t, err := time.Parse(layout, s)
		if err == nil && t.UTC().Year() >= 1677 && t.UTC().Year() <= 2262 {
			return micros(t.Unix()-pgEpoch)*1e6 + micros(t.Nanosecond()/1000), nil
		}
	}
	return 0, errBadTime
}

// number is a value: any float64 but infinity, or NULL, which is NaN.
type number float64

var notGiven = number(math.Inf(1))

func (n *number) UnmarshalJSON(b []byte) error {
	f, err := math.NaN(), error(nil)
	if string(b) != "null" {
		f, err = strconv.ParseFloat(string(b), 64)
	}
	if *n = number(f); err != nil {
		return &json.UnmarshalTypeError{Value: string(b), Type: reflect.TypeFor[number]()}
	}
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
