package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"database/sql/driver"
	"encoding/csv"
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
	// readTimeout lets a slow line send a full body; writeTimeout begins anew with each piece of a stream, so a long
	// stream may last but a stalled reader may not.
	readHeaderTimeout = 10 * time.Second
	readTimeout       = 2 * time.Minute
	writeTimeout      = 30 * time.Second
	idleTimeout       = 2 * time.Minute
	drainTimeout      = 30 * time.Second // for running requests after SIGTERM
	requestTimeout    = time.Minute      // for the database's part of a request that does not stream

	// net/http adds 4 KiB to what it is told: headers beyond 16 KiB are answered 431.
	maxHeaderBytes = 12 << 10

	// maxBody, after decompression, is some 600,000 rows of JSON or 1.4 million of CSV, of 24 bytes each once decoded.
	maxBody    = 64 << 20
	maxUpdates = 10_000 // per PUT /values: they hold their tenant's lock together
	maxRuns    = 10_000 // per GET /runs: they are collected in memory
	maxText    = 500    // bytes of a key, unit, workflow_id or tag; PostgreSQL indexes keys up to some 2,700
	maxProse   = 10_000 // bytes of a description or annotation
	maxParams  = 16 << 10

	// databaseSlots requests use the database at once; the rest of the pool is left to look keys up. bulkSlots of them
	// may be large: a body over smallBody or a response over flushBytes. Who waits longer than slotWait gets 503.
	databaseSlots = poolSize - 8
	bulkSlots     = databaseSlots / 2
	slotWait      = 2 * time.Second
	smallBody     = 1 << 20
	flushBytes    = 64 << 10
	minGzip       = 1400 // bytes; what fits one packet gains nothing

	defaultUnit     = "dimensionless"
	defaultWorkflow = "api-workflow"
)

// apiError is what a request is refused with: a status and the sentence for {"detail": …}. Any other error of a handler
// becomes a 500 that explains nothing.
type apiError struct {
	status  int
	message string
	reason  string // for the log alone; "" when the message says it all
}

func (e *apiError) Error() string { return e.message }

func refusal(status int, format string, args ...any) error {
	return &apiError{status, fmt.Sprintf(format, args...), ""}
}
func invalid(format string, args ...any) error  { return refusal(422, format, args...) }
func notFound(format string, args ...any) error { return refusal(404, format, args...) }
func conflict(format string, args ...any) error { return refusal(409, format, args...) }

// ---- routes and the one way to them

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
	store    *store
	auth     *authenticator
	log      *slog.Logger
	mux      *http.ServeMux // only finds the pattern; serve calls its route
	routes   map[string]route
	database chan struct{} // slots
	bulk     chan struct{}
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
		{"GET /runs", needsRead, s.getRuns},
	}
}

func newServer(st *store, auth *authenticator, log *slog.Logger) *server {
	s := &server{st, auth, log, http.NewServeMux(), map[string]route{},
		make(chan struct{}, databaseSlots), make(chan struct{}, bulkSlots)}
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

func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter } // for http.ResponseController

// ServeHTTP answers and logs one request. A response that fails after it began breaks the connection, so that it cannot
// be taken for complete.
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
	if w.status != http.StatusTooManyRequests { // the 401s before it were logged, and its rate has no bound
		s.log.Log(r.Context(), level, "request", "method", r.Method, "path", r.URL.Path, "status", w.status, "broken", broken,
			"reason", cmp.Or(e.reason, e.message), "remote", r.RemoteAddr, "tenant", c.tenant, "key_id", c.keyID,
			"duration", time.Since(begin).Round(time.Microsecond))
	}
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
	switch e.status {
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", "ApiKey")
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "1")
	case http.StatusTooManyRequests:
		w.Header().Set("Retry-After", strconv.Itoa(int(failureWindow.Seconds())))
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

// take waits for a slot and returns what gives it back. No slot within slotWait is a 503.
func take(ctx context.Context, slots chan struct{}) (release func(), err error) {
	select {
	case slots <- struct{}{}:
		return func() { <-slots }, nil
	case <-ctx.Done():
	case <-time.After(slotWait):
	}
	return nil, refusal(http.StatusServiceUnavailable, "The server is busy. Try again.")
}

// useDatabase runs fn while it holds a database slot, for requestTimeout at most. A request that was found wanting (err)
// is refused here.
func (s *server) useDatabase(r *http.Request, err error, fn func(ctx context.Context) (any, error)) (any, error) {
	if err != nil {
		return nil, err
	}
	release, err := take(r.Context(), s.database)
	if err != nil {
		return nil, err
	}
	defer release()
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	return fn(ctx)
}

// ---- requests

// reader reads a request's body; kind is its media type.
type reader func(body io.Reader, kind string) error

// readBody calls read with the body, decompressed and bounded, if it is one of types. A large one holds a bulk slot.
func (s *server) readBody(w http.ResponseWriter, r *http.Request, read reader, types ...string) error {
	kind, options, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || !slices.Contains(types, kind) || !strings.EqualFold(cmp.Or(options["charset"], "utf-8"), "utf-8") {
		return refusal(http.StatusUnsupportedMediaType, "Content-Type: expected %s in UTF-8.", strings.Join(types, " or "))
	}
	encoding := cmp.Or(strings.ToLower(r.Header.Get("Content-Encoding")), "identity")
	if encoding != "identity" && encoding != "gzip" {
		return refusal(http.StatusUnsupportedMediaType, "Content-Encoding: expected gzip or none.")
	}
	if r.ContentLength > maxBody {
		return &http.MaxBytesError{Limit: maxBody}
	}
	if r.ContentLength < 0 || r.ContentLength > smallBody || encoding == "gzip" {
		release, err := take(r.Context(), s.bulk)
		if err != nil {
			return err
		}
		defer release()
	}
	body := http.MaxBytesReader(w, r.Body, maxBody)
	if encoding == "gzip" {
		unzipped, err := gzip.NewReader(body)
		if err != nil {
			return inputError("body", err)
		}
		body = http.MaxBytesReader(w, unzipped, maxBody)
	}
	return read(body, kind)
}

// readJSON reads a request that takes nothing but JSON.
func (s *server) readJSON(w http.ResponseWriter, r *http.Request, c Caller, f fields) error {
	return s.readBody(w, r, func(body io.Reader, _ string) error {
		if err := f.decodeJSON(body); err != nil {
			return err
		}
		return fields{}.decodeQuery(r, c)
	}, "application/json")
}

// fields says where the members of a request object, its query parameters or the columns of its CSV go: name to pointer.
// What is not given keeps its value. An eachElement in place of the pointer takes an array.
type fields map[string]any

// eachElement decodes one element of an array, so that one at a time is held; field is where it stands in the request.
type eachElement func(field string, dec *json.Decoder) error

// decodeJSON reads one JSON object and nothing after it. Unlike encoding/json it refuses a member that is given twice or
// in another case.
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

// inputError says in one sentence what is wrong with the input at field. What is not the input's fault, and what is
// such a sentence already, passes unchanged.
func inputError(field string, err error) error {
	var typeErr *json.UnmarshalTypeError
	var csvErr *csv.ParseError
	var e *apiError
	var tooLarge *http.MaxBytesError
	switch {
	case err == nil, errors.As(err, &e), errors.As(err, &tooLarge), errors.Is(err, os.ErrDeadlineExceeded):
		return err
	case errors.As(err, &typeErr):
		field = strings.TrimSuffix(field+"."+inWords.Replace(typeErr.Field), ".")
		return invalid("%s: expected %s, not %.40s", field, inWords.Replace(typeErr.Type.String()), typeErr.Value)
	case errors.As(err, &csvErr):
		return invalid("line %d: malformed CSV: %s", csvErr.Line, csvErr.Err)
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

// setField parses text, of a query parameter or a CSV, into what the pointer points to.
func setField(field string, into any, text string) (err error) {
	switch into := into.(type) {
	case *string:
		*into = text
	case *bool:
		if *into, err = strconv.ParseBool(text); err != nil {
			err = errors.New("expected true or false")
		}
	case *int64:
		if *into, err = strconv.ParseInt(text, 10, 64); err != nil || *into < 1 {
			err = errors.New("expected a whole number of at least 1")
		}
	case *micros:
		*into, err = parseTime(text)
	case **micros:
		*into = new(micros)
		**into, err = parseTime(text)
	case *span:
		*into, err = parseSpan(text)
	case *number:
		*into, err = parseNumber(text)
	default:
		if json.Unmarshal([]byte(text), into) != nil {
			err = errors.New("expected a JSON object")
		}
	}
	return inputError(field, err)
}

// checkText returns an error unless s can be stored and shown: not blank, UTF-8, of at most limit bytes; in prose line
// ends are allowed, other control characters never.
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

// newUUID returns a random (version 4) UUID.
func newUUID() string {
	b := make([]byte, 16)
	rand.Read(b)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// checkTenant refuses a tenant_id that is not the caller's: it never changes whom a request acts for.
func checkTenant(c Caller, field, id string) error {
	if err := checkUUID(field, &id); err != nil || id == "" || id == c.tenant {
		return err
	}
	return refusal(http.StatusForbidden, "%s is not the tenant of this API key.", field)
}

// ---- handlers

func (s *server) getRoot(http.ResponseWriter, *http.Request, Caller) (any, error) {
	endpoints := map[string]access{}
	for _, rt := range s.table() {
		endpoints[strings.TrimSuffix(rt.pattern, "{$}")] = rt.access
	}
	return map[string]any{
		"name":        "TimeDB API",
		"version":     versionOf(),
		"description": "Versioned time series: what was known of each moment, and when.",
		"endpoints":   endpoints,
		"authentication": map[string]string{"method": "API key", "header": "X-API-Key",
			"note": "Once users exist, every route that holds data needs a key."},
		"admin_note": "Tables and users are managed with the timedb command line.",
	}, nil
}

func (s *server) getHealth(_ http.ResponseWriter, r *http.Request, _ Caller) (any, error) {
	ctx, cancel := context.WithTimeout(r.Context(), slotWait)
	defer cancel()
	if _, err := s.store.relations(ctx); err != nil {
		return nil, &apiError{http.StatusServiceUnavailable, "The database is not available.", err.Error()}
	}
	return map[string]string{"status": "ok"}, nil
}

func (s *server) postSeries(w http.ResponseWriter, r *http.Request, c Caller) (any, error) {
	x := series{Unit: defaultUnit}
	err := s.readJSON(w, r, c, fields{"name": &x.Key, "description": &x.Description, "unit": &x.Unit})
	err = cmp.Or(err, checkText("name", x.Key, maxText), checkText("unit", x.Unit, maxText),
		checkText("description", cmp.Or(x.Description, "none"), maxProse))
	return s.useDatabase(r, err, func(ctx context.Context) (any, error) {
		id, created, err := s.store.CreateSeries(ctx, c, x)
		message := map[bool]string{true: "Series created successfully", false: "Series already exists"}[created]
		return map[string]string{"series_id": id, "message": message}, err
	})
}

func (s *server) getSeries(_ http.ResponseWriter, r *http.Request, c Caller) (any, error) {
	err := fields{}.decodeQuery(r, c)
	return s.useDatabase(r, err, func(ctx context.Context) (any, error) { return s.store.SeriesByID(ctx, c) })
}

func (s *server) getRuns(_ http.ResponseWriter, r *http.Request, c Caller) (any, error) {
	q := runQuery{startKnown: beginning, endKnown: endOfTime, limit: 1000}
	f := fields{"workflow_id": &q.workflowID, "start_known": &q.startKnown, "end_known": &q.endKnown, "limit": &q.limit}
	err := cmp.Or(f.decodeQuery(r, c), checkRange("known", q.startKnown, q.endKnown))
	if err == nil && q.limit > maxRuns {
		err = invalid("limit: expected at most %d", maxRuns)
	}
	return s.useDatabase(r, err, func(ctx context.Context) (any, error) {
		runs, err := s.store.Runs(ctx, c, q)
		return map[string]any{"count": len(runs), "data": runs}, err
	})
}

// valueRow is what one of value_rows and one of updates have in common. The fields begin with what no request can hold,
// to tell "not given".
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

// uploadParser collects rows by the series that they name.
type uploadParser struct {
	*upload
	seen map[[2]string]int // where in upload.series a series_id and value_key stand
}

// add checks a row and takes it; field is where it stands in the request.
func (p *uploadParser) add(field string, row *uploadRow) error {
	if row.Value == notGiven {
		return invalid("%s.value is required (a number or null)", field)
	}
	name := [2]string{row.SeriesID, row.ValueKey}
	i, known := p.seen[name]
	if !known || row.ValidTime == noEnd || row.ValidTimeEnd != noEnd { // the other checks hold for all rows of a series
		if err := row.check(field, "value_key", row.ValueKey); err != nil {
			return err
		}
	}
	if !known {
		i = len(p.series)
		p.seen[name] = i
		p.series = append(p.series, seriesRef{row.SeriesID, row.ValueKey, field})
		p.points = append(p.points, nil)
	}
	p.points[i] = append(p.points[i], point{row.ValidTime, row.ValidTimeEnd, float64(row.Value)})
	p.rows++
	return nil
}

// decodeRow decodes one of value_rows and takes it.
func (p *uploadParser) decodeRow(field string, dec *json.Decoder) error {
	row := uploadRow{valueRow: emptyRow}
	if err := dec.Decode(&row); err != nil {
		return err
	}
	return p.add(field, &row)
}

// readCSV reads rows under a header line, in which the columns may have any order.
func (p *uploadParser) readCSV(body io.Reader) error {
	in := csv.NewReader(body)
	in.ReuseRecord = true
	header, err := in.Read()
	if err != nil {
		return inputError("header", err)
	}
	var row uploadRow
	cells := fields{"valid_time": &row.ValidTime, "valid_time_end": &row.ValidTimeEnd, "series_id": &row.SeriesID,
		"value_key": &row.ValueKey, "value": &row.Value}
	names, columns := slices.Clone(header), make([]any, len(header))
	for i := range names {
		names[i] = strings.TrimPrefix(names[i], "\ufeff") // spreadsheets begin a file with a byte order mark
		if columns[i] = cells[names[i]]; columns[i] == nil {
			return invalid("header: column %q is unknown or given twice", names[i])
		}
		delete(cells, names[i])
	}
	for {
		record, err := in.Read()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return inputError("body", err)
		}
		number, _ := in.FieldPos(0)
		line := "line " + strconv.Itoa(number)
		row = uploadRow{valueRow: emptyRow}
		for i, text := range record {
			if text == "" && columns[i] != any(&row.Value) {
				continue // not given; an empty value is NULL
			}
			if err := setField(names[i], columns[i], text); err != nil {
				return invalid("%s: %s", line, err)
			}
		}
		if err := p.add(line, &row); err != nil {
			return err
		}
	}
}

// postUpload takes a run as JSON, or its values as CSV and the rest as query parameters.
func (s *server) postUpload(w http.ResponseWriter, r *http.Request, c Caller) (result any, err error) {
	u, tenant := &upload{workflowID: defaultWorkflow}, ""
	p := &uploadParser{u, map[[2]string]int{}}
	run := fields{"run_id": &u.runID, "workflow_id": &u.workflowID, "run_start_time": &u.start, "run_finish_time": &u.finish,
		"known_time": &u.known, "run_params": &u.params, "series_descriptions": &u.descriptions, "tenant_id": &tenant}
	err = s.readBody(w, r, func(body io.Reader, kind string) error {
		digest := sha256.New() // of all that makes the request: how it is read, its parameters and its body
		fmt.Fprintf(digest, "%s?%s\n", kind, r.URL.Query().Encode())
		body = io.TeeReader(body, digest)
		if kind == "text/csv" {
			if err = run.decodeQuery(r, c); err == nil {
				err = p.readCSV(body)
			}
		} else {
			run["value_rows"] = eachElement(p.decodeRow)
			if err = run.decodeJSON(body); err == nil {
				err = cmp.Or(checkTenant(c, "tenant_id", tenant), fields{}.decodeQuery(r, c))
			}
		}
		if err == nil {
			err = checkRun(u)
		}
		digest.Sum(u.digest[:0])
		result, err = s.useDatabase(r, err, func(ctx context.Context) (any, error) {
			ids, err := s.store.Upload(ctx, c, u)
			return map[string]any{"run_id": u.runID, "message": "Run created successfully", "series_ids": ids, "rows_inserted": u.rows}, err
		})
		return err
	}, "application/json", "text/csv")
	return result, err
}

// checkRun checks what is not a row, and chooses a run_id if the client did not.
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
	for key, text := range u.descriptions {
		if !slices.ContainsFunc(u.series, func(ref seriesRef) bool { return ref.key == key }) {
			return invalid("series_descriptions: no row has the value_key %q", key)
		}
		if err := checkText("series_descriptions."+key, text, maxProse); err != nil {
			return err
		}
	}
	err := cmp.Or(checkText("workflow_id", u.workflowID, maxText), checkUUID("run_id", &u.runID))
	u.runID = cmp.Or(u.runID, newUUID())
	return err
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
		End: row.ValidTimeEnd, setTags: row.Tags.given}
	if row.RunID != "" {
		u.RunID = &row.RunID
	}
	if row.Value != notGiven {
		u.value = (*float64)(&row.Value)
	}
	if row.Annotation.given {
		u.annotation = new(strings.TrimSpace(row.Annotation.value))
		err = cmp.Or(err, checkText(field+".annotation", cmp.Or(*u.annotation, "none"), maxProse))
	}
	for _, tag := range row.Tags.value {
		err = cmp.Or(err, checkText(field+".tags", tag, maxText))
		u.tags = append(u.tags, strings.ToLower(strings.TrimSpace(tag)))
	}
	slices.Sort(u.tags)
	u.tags = slices.Compact(u.tags)
	if u.value == nil && u.annotation == nil && !u.setTags {
		err = cmp.Or(err, invalid("%s: value, annotation or tags is required", field))
	}
	return u, err
}

func (s *server) putValues(w http.ResponseWriter, r *http.Request, c Caller) (any, error) {
	var updates []valueUpdate
	err := s.readJSON(w, r, c, fields{"updates": eachElement(func(field string, dec *json.Decoder) error {
		u, err := decodeUpdate(c, field, dec)
		if updates = append(updates, u); len(updates) > maxUpdates {
			err = invalid("updates: expected at most %d", maxUpdates)
		}
		return err
	})})
	return s.useDatabase(r, err, func(ctx context.Context) (any, error) {
		updated, skipped, err := s.store.UpdateValues(ctx, c, updates)
		return map[string]any{"updated": updated, "skipped_no_ops": skipped}, err
	})
}

func (s *server) getValues(w http.ResponseWriter, r *http.Request, c Caller) (any, error) {
	q := readQuery{start: beginning, end: endOfTime, startKnown: beginning, endKnown: endOfTime, asOf: endOfTime, lead: anyLead}
	mode, format := "flat", "json"
	if strings.Contains(r.Header.Get("Accept"), "text/csv") {
		format = "csv"
	}
	var ids, keys []string
	var detail bool
	var limit int64
	err := fields{"start_valid": &q.start, "end_valid": &q.end, "start_known": &q.startKnown, "end_known": &q.endKnown,
		"mode": &mode, "all_versions": &q.allVersions, "series_id": &ids, "series_key": &keys, "as_of": &q.asOf, "lead": &q.lead,
		"detail": &detail, "bucket": &q.bucket, "agg": &q.agg, "limit": &limit, "format": &format}.decodeQuery(r, c)
	for _, id := range ids {
		id = cmp.Or(id, "none") // an empty parameter must not select everything
		err = cmp.Or(err, checkUUID("series_id", &id))
		q.series = append(q.series, seriesRef{id: id, field: "series_id"})
	}
	for _, key := range keys {
		err = cmp.Or(err, checkText("series_key", key, maxText))
		q.series = append(q.series, seriesRef{key: key, field: "series_key"})
	}
	q.overlapping, detail = mode == "overlapping", detail || q.allVersions
	if err := cmp.Or(err, checkRead(q, mode, format, detail)); err != nil {
		return nil, err
	}
	release, err := take(r.Context(), s.database)
	if err != nil {
		return nil, err
	}
	defer release()
	out := newRowWriter(w, r, format == "csv", q.overlapping, detail)
	out.limit, out.bulk = limit, s.bulk
	defer func() { out.release() }()
	if err := s.store.Read(r.Context(), c, q, out.row); err != nil && err != errEnough {
		return nil, err
	}
	return nil, out.finish()
}

// checkRead refuses parameters that contradict each other.
func checkRead(q readQuery, mode, format string, detail bool) error {
	switch {
	case mode != "flat" && mode != "overlapping":
		return invalid("mode: expected flat or overlapping")
	case format != "json" && format != "csv":
		return invalid("format: expected json or csv")
	case (q.bucket == 0) != (q.agg == ""):
		return invalid("bucket and agg: expected both or none")
	case q.bucket != 0 && (q.overlapping || detail):
		return invalid("bucket: aggregates only what mode=flat shows, without detail or all_versions")
	case q.bucket != 0 && !slices.Contains([]string{"mean", "min", "max", "sum", "count"}, q.agg):
		return invalid("agg: expected mean, min, max, sum or count")
	}
	return cmp.Or(checkRange("valid", q.start, q.end), checkRange("known", q.startKnown, q.endKnown))
}

// checkRange refuses a range of valid or known times that nothing can lie in.
func checkRange(times string, start, end micros) error {
	if end > start {
		return nil
	}
	return invalid("end_%[1]s: expected a time after start_%[1]s", times)
}

// ---- rows out

// rowWriter streams values as JSON or CSV. Nothing is sent before flushBytes are full, so that what fails early still
// gets a proper status.
type rowWriter struct {
	w       http.ResponseWriter
	r       *http.Request
	bulk    chan struct{}
	release func() // of the bulk slot
	limit   int64  // 0: none

	csv, brief         bool   // brief: only an interval shows its end, the last column
	open, between, end string // of a row; between is open for all but the first
	quote, null        string
	columns            []column
	count              int64
	series             *series // of the last row, and its key and unit as they are written
	key, unit          []byte
	buf                []byte
	out                io.Writer // to w, perhaps compressing; nil until the header is sent
}

// column is one of a row's. lead comes before its cell: a comma, and in JSON its name.
type column struct {
	lead string
	cell func(o *rowWriter, b []byte, e *element) []byte
}

// cells appends the cell of each column that there is.
var cells = map[string]func(o *rowWriter, b []byte, e *element) []byte{
	"valid_time":     func(o *rowWriter, b []byte, e *element) []byte { return o.time(b, e.time) },
	"valid_time_end": func(o *rowWriter, b []byte, e *element) []byte { return o.time(b, e.end) },
	"known_time":     func(o *rowWriter, b []byte, e *element) []byte { return o.time(b, e.from.Known) },
	"change_time":    func(o *rowWriter, b []byte, e *element) []byte { return o.time(b, e.from.Change) },
	"series_id":      func(o *rowWriter, b []byte, e *element) []byte { return o.quoted(b, o.series.ID) },
	"series_key":     func(o *rowWriter, b []byte, e *element) []byte { return append(b, o.key...) },
	"series_unit":    func(o *rowWriter, b []byte, e *element) []byte { return append(b, o.unit...) },
	"value":          func(o *rowWriter, b []byte, e *element) []byte { return o.number(b, e.value) },
	"run_id":         func(o *rowWriter, b []byte, e *element) []byte { return o.quoted(b, e.from.RunID) },
	"changed_by":     func(o *rowWriter, b []byte, e *element) []byte { return o.text(b, e.from.ChangedBy) },
	"annotation":     func(o *rowWriter, b []byte, e *element) []byte { return o.text(b, e.from.Annotation) },
	"tags":           func(o *rowWriter, b []byte, e *element) []byte { return o.text(b, e.from.Tags) },
	"version":        func(o *rowWriter, b []byte, e *element) []byte { return strconv.AppendInt(b, int64(e.from.Number), 10) },
}

// newRowWriter chooses the columns and the format.
func newRowWriter(w http.ResponseWriter, r *http.Request, csv, overlapping, detail bool) *rowWriter {
	names := "valid_time,series_id,value,series_key,series_unit"
	if detail {
		names += ",run_id,known_time,valid_time_end,change_time,changed_by,annotation,tags,version"
	} else {
		names += ",valid_time_end"
	}
	if overlapping {
		names = "known_time," + strings.Replace(names, ",known_time", "", 1)
	}
	o := &rowWriter{w: w, r: r, release: func() {}, csv: csv, brief: !csv && !detail}
	if csv {
		o.buf, o.end = []byte(names+"\n"), "\n"
	} else {
		o.buf, o.open, o.between, o.end, o.quote, o.null = []byte(`{"data":[`), "{", ",{", "}", `"`, "null"
	}
	for i, name := range strings.Split(names, ",") {
		lead := ","[:min(i, 1)] // none before the first
		if !csv {
			lead += `"` + name + `":`
		}
		o.columns = append(o.columns, column{lead, cells[name]})
	}
	return o
}

// errEnough ends a read whose limit is reached.
var errEnough = errors.New("limit reached")

// row writes one row; the limit-th returns errEnough.
func (o *rowWriter) row(x *series, e *element) error {
	if x != o.series {
		o.series, o.key, o.unit = x, o.text(nil, x.Key), o.text(nil, x.Unit)
	}
	columns := o.columns
	if o.brief && e.end == noEnd {
		columns = columns[:len(columns)-1]
	}
	b := append(o.buf, o.open...)
	for i := range columns {
		b = columns[i].cell(o, append(b, columns[i].lead...), e)
	}
	o.buf = append(b, o.end...)
	o.open = o.between
	o.count++
	if len(o.buf) >= flushBytes {
		if err := o.flush(false); err != nil {
			return err
		}
	}
	if o.count == o.limit {
		return errEnough
	}
	return nil
}

// quoted appends a text that needs no escape.
func (o *rowWriter) quoted(b []byte, s string) []byte {
	return append(append(append(b, o.quote...), s...), o.quote...)
}

func (o *rowWriter) time(b []byte, t micros) []byte {
	if t == noEnd {
		return append(b, o.null...)
	}
	return append(t.append(append(b, o.quote...)), o.quote...)
}

func (o *rowWriter) number(b []byte, f float64) []byte {
	if math.IsNaN(f) {
		return append(b, o.null...)
	}
	return appendNumber(b, f)
}

// text appends a string, or a list of strings as JSON.
func (o *rowWriter) text(b []byte, v any) []byte {
	text, _ := json.Marshal(v) // strings always marshal
	switch {
	case string(text) == "null":
		return append(b, o.null...)
	case !o.csv:
		return append(b, text...)
	}
	cell := string(text)
	_ = json.Unmarshal(text, &cell) // a list stays JSON
	if strings.ContainsAny(cell, ",\"\r\n") {
		cell = `"` + strings.ReplaceAll(cell, `"`, `""`) + `"`
	}
	return append(b, cell...)
}

var gzipAccepted = regexp.MustCompile(`(?i)(^|,)\s*gzip\s*(,|$|;\s*q=(1|0\.0*[1-9]))`)

// flush sends what is buffered. Before anything was sent it may still fail with a 503; last says that nothing follows.
func (o *rowWriter) flush(last bool) (err error) {
	if o.out == nil {
		if !last {
			if o.release, err = take(o.r.Context(), o.bulk); err != nil {
				return err
			}
		}
		o.out = o.w
		header := o.w.Header()
		header.Set("Content-Type", map[bool]string{true: "text/csv; charset=utf-8", false: "application/json"}[o.csv])
		header.Set("Vary", "Accept, Accept-Encoding")
		if len(o.buf) >= minGzip && gzipAccepted.MatchString(o.r.Header.Get("Accept-Encoding")) {
			header.Set("Content-Encoding", "gzip")
			o.out, _ = gzip.NewWriterLevel(o.w, gzip.BestSpeed) // it fails on an unknown level only
		}
		o.w.WriteHeader(http.StatusOK)
	}
	if err := http.NewResponseController(o.w).SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err = o.out.Write(o.buf)
	o.buf = o.buf[:0]
	return err
}

// finish ends a complete response.
func (o *rowWriter) finish() error {
	if !o.csv {
		o.buf = fmt.Appendf(o.buf, "],\"count\":%d}\n", o.count)
	}
	err := o.flush(true)
	if zipped, ok := o.out.(*gzip.Writer); ok && err == nil {
		err = zipped.Close()
	}
	return err
}

// ---- times and numbers as they are written

// micros counts microseconds since 2000-01-01 UTC: PostgreSQL's own form of a timestamptz, exact and of 8 bytes. The
// smallest and the greatest value are PostgreSQL's -infinity and infinity.
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

// span is a duration in microseconds; anyLead is less than every lead.
type span micros

const anyLead = span(beginning)

var isoSpan = regexp.MustCompile(`^P(?:(\d{1,5})W)?(?:(\d{1,6})D)?(?:T((?:\d+H)?(?:\d+M)?(?:\d+(?:\.\d+)?S)?))?$`)

// parseSpan reads a positive duration, as ISO 8601 (P1DT12H; no months or years, whose length differs) or as Go writes
// it (36h). It counts in microseconds.
func parseSpan(s string) (span, error) {
	var days int
	if m := isoSpan.FindStringSubmatch(s); m != nil && len(s) > 2 {
		weeks, _ := strconv.Atoi(m[1]) // digits or nothing
		days, _ = strconv.Atoi(m[2])
		days += 7 * weeks
		s = cmp.Or(strings.ToLower(m[3]), "0s")
	}
	d, err := time.ParseDuration(s)
	if d += time.Duration(days) * 24 * time.Hour; err != nil || d < time.Microsecond || days > 100_000 {
		return 0, errors.New("expected a positive duration such as PT36H, P1D or 90m")
	}
	return span(d.Microseconds()), nil
}

// number is a value: any float64 but infinity, or NULL, which is NaN.
type number float64

var notGiven = number(math.Inf(1))

func parseNumber(s string) (number, error) {
	if s == "" || s == "NaN" || s == "nan" {
		return number(math.NaN()), nil
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsInf(f, 0) || math.IsNaN(f) {
		return 0, errors.New("expected a finite number, or nothing for NULL")
	}
	return number(f), nil
}

func (n *number) UnmarshalJSON(b []byte) (err error) {
	if *n, err = parseNumber(strings.TrimPrefix(string(b), "null")); err != nil {
		return &json.UnmarshalTypeError{Value: string(b), Type: reflect.TypeFor[number]()}
	}
	return nil
}

// appendNumber writes f so that it reads as a float: 20.0, not 20.
func appendNumber(b []byte, f float64) []byte {
	n := len(b)
	if abs := math.Abs(f); abs != 0 && (abs < 1e-4 || abs >= 1e16) {
		return strconv.AppendFloat(b, f, 'e', -1, 64)
	}
	if b = strconv.AppendFloat(b, f, 'f', -1, 64); !bytes.ContainsRune(b[n:], '.') {
		b = append(b, '.', '0')
	}
	return b
}
