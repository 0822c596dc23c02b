package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"database/sql/driver"
	"embed"
	"encoding"
	"encoding/base64"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
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
	"sync/atomic"
	"time"
	"unicode"
)

//go:embed web
var web embed.FS // what is served as it is, to everyone

const (
	readHeaderTimeout = 10 * time.Second
	readTimeout       = 2 * time.Minute  // lets a slow line send a full body
	writeTimeout      = 30 * time.Second // anew for each piece of a stream
	idleTimeout       = 2 * time.Minute
	drainTimeout      = 30 * time.Second // for running requests after SIGTERM
	maxHeaderBytes    = 12 << 10         // net/http adds 4 KiB: headers beyond 16 KiB are answered 431
	maxBody           = 64 << 20         // some 600,000 rows as JSON, of 24 bytes each once decoded
	largeBody         = 1 << 20          // a body beyond it counts as large, and rawJSON takes no more
	maxLarge          = 16               // large requests at once: fewer than the pool has connections, so small ones find one
	maxSeries         = 100_000          // of one upload: each takes some hundred bytes, whatever its rows
	maxUpdates        = 10_000           // per PUT /values: they hold their tenant's lock together
	maxTags           = 100              // of one value
	maxParams         = 16 << 10         // bytes of run_params, which PostgreSQL parses as jsonb
	maxLine           = 4 << 10          // of a CSV
	maxRuns           = 10_000           // per GET /runs: they are collected in memory
	flushBytes        = 64 << 10         // of a stream at a time
	minGzip           = 16 << 10         // bytes of an answer: a smaller one is sent sooner than it is compressed
	defaultUnit       = "dimensionless"
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
func invalid(format string, args ...any) error { return refusal(422, format, args...) }

// invalidIf is for rules that stand in a list: the first that is broken is the answer.
func invalidIf(broken bool, format string, args ...any) error {
	if broken {
		return invalid(format, args...)
	}
	return nil
}

// route is one line of the route table. handle reads the request, all of it, and returns what answers it.
type route struct {
	pattern string
	access  string // "write" or "read": it needs a key that may; "open": it needs none, as it holds no data
	handle  func(w *response, r *http.Request, c Caller) (work, error)
}

// work answers a request: what it returns is sent as JSON, unless it is nil: then it was sent already.
type work func(ctx context.Context) (any, error)

func (route) ServeHTTP(http.ResponseWriter, *http.Request) {} // for http.ServeMux, which only finds the route

// server serves HTTP. It keeps no state that another server of the same database would have to know.
type server struct {
	store   *store
	health  func(context.Context) (bool, error) // an error: the database does not answer
	auth    *authenticator
	log     *slog.Logger
	mux     *http.ServeMux
	large   atomic.Int64  // large requests that are being served; claimIf counts them
	working chan struct{} // holds one for each request that may use the database: as many as the pool has connections
}

func (s *server) routes() []route {
	return []route{
		{"GET /{$}", "open", getPage("root.json", "application/json")},
		{"GET /openapi.json", "open", getPage("openapi.json", "application/json")},
		{"GET /docs", "open", getPage("docs.html", "text/html; charset=utf-8")},
		{"GET /healthz", "open", s.getHealth},
		{"POST /upload", "write", s.postUpload},
		{"GET /values", "read", s.getValues},
		{"PUT /values", "write", s.putValues},
		{"POST /series", "write", s.postSeries},
		{"GET /list_timeseries", "read", s.getSeries},
		{"GET /runs", "read", s.getRuns},
	}
}

func newServer(st *store, health func(context.Context) (bool, error), auth *authenticator, log *slog.Logger) *server {
	s := &server{store: st, health: health, auth: auth, log: log, mux: http.NewServeMux(), working: make(chan struct{}, poolSize)}
	for _, rt := range s.routes() {
		s.mux.Handle(rt.pattern, rt)
	}
	return s
}

// response remembers what was answered, and compresses it if the client accepts that and it is long enough.
type response struct {
	http.ResponseWriter
	accepts string        // the request's Accept-Encoding
	large   *atomic.Int64 // how many large requests there are
	claimed bool          // this is one of them
	status  int           // 0: nothing was sent yet
	body    io.Writer     // where send writes pieces: to the client, or to what compresses them
}

// claimIf counts this request among the large ones if it is one, unless there are too many: then it is a 503.
func (w *response) claimIf(large bool) error {
	if large && !w.claimed && w.large.Add(1) > maxLarge {
		w.large.Add(-1)
		return refusal(http.StatusServiceUnavailable, "The server is busy with other large requests.")
	}
	w.claimed = w.claimed || large
	return nil
}

// Only send writes. Of ServeMux's own answer its header is left, which knows what methods a path takes.
func (*response) WriteHeader(int)             {}
func (*response) Write(b []byte) (int, error) { return len(b), nil }

var gzipAccepted = regexp.MustCompile(`(?i)(^|,)\s*gzip\s*(,|$|;\s*q=(1|0\.0*[1-9]))`)

// send writes a piece of the answer, for which the client gets a new writeTimeout; before the first the header, with the last the end.
func (w *response) send(status int, contentType string, piece []byte, last bool) error {
	if w.status == 0 {
		header := w.Header()
		header.Set("Content-Type", contentType)
		header.Set("Vary", "Accept, Accept-Encoding")
		w.status, w.body = status, w.ResponseWriter
		if len(piece) > minGzip && gzipAccepted.MatchString(w.accepts) {
			header.Set("Content-Encoding", "gzip")
			w.body, _ = gzip.NewWriterLevel(w.ResponseWriter, gzip.BestSpeed) // it fails on an unknown level only
		} else if last {
			header.Set("Content-Length", fmt.Sprint(len(piece)))
		}
		w.ResponseWriter.WriteHeader(status)
	}
	err := http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Now().Add(writeTimeout))
	if err == nil {
		_, err = w.body.Write(piece)
	}
	if zip, zipped := w.body.(*gzip.Writer); zipped && last && err == nil {
		err = zip.Close()
	}
	return err
}

// ServeHTTP answers and logs one request. A response that fails after it began breaks the connection: it is not complete.
func (s *server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	begin := time.Now()
	w := &response{ResponseWriter: rw, accepts: r.Header.Get("Accept-Encoding"), large: &s.large}
	c, answer, err := s.serve(w, r)
	if answer != "" {
		err = w.send(http.StatusOK, "application/json", []byte(answer), true)
	}
	broken, reason := err != nil && w.status != 0, ""
	if err != nil {
		reason = w.fail(err)
	}
	if w.claimed {
		s.large.Add(-1)
	}
	if reason == unlogged {
		return
	}
	level := map[bool]slog.Level{true: slog.LevelError, false: slog.LevelInfo}[(broken || w.status >= 500) && r.Context().Err() == nil]
	hide := func(text string) string { return secretPattern.ReplaceAllLiteralString(text, "(a key)") } // wherever it was pasted
	s.log.Log(r.Context(), level, "request", "method", r.Method, "path", hide(r.URL.Path), "status", w.status, "broken", broken,
		"reason", hide(reason), "remote", r.RemoteAddr, "tenant", c.tenant, "key_id", c.keyID,
		"duration", time.Since(begin).Round(time.Microsecond))
	if broken {
		panic(http.ErrAbortHandler)
	}
}

// serve is the only way to a handler: it authenticates, then looks whether the path exists, then checks access. It returns the
// JSON that is to be sent, or "" if an error is or the answer was sent already.
func (s *server) serve(w *response, r *http.Request) (c Caller, answer string, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	handler, _ := s.mux.Handler(r)
	rt, known := handler.(route)
	if rt.access != "open" {
		if c, err = s.auth.authenticate(r); err != nil {
			return c, "", err
		}
	}
	if !known {
		handler.ServeHTTP(w, r)
		if methods := w.Header().Get("Allow"); methods != "" {
			return c, "", refusal(http.StatusMethodNotAllowed, "This path takes %s.", methods)
		}
		return c, "", refusal(404, "There is nothing at this path.")
	}
	if rt.access != "read" && c.readOnly {
		return c, "", refusal(http.StatusForbidden, "This API key is read-only.")
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	do, err := rt.handle(w, r, c)
	if err != nil {
		_, _ = io.Copy(io.Discard, r.Body) // a client that is still sending would not see the answer; its error would say no more
		return c, "", err
	}
	ctx, cancel := context.WithTimeout(r.Context(), statementTimeout) // what moves as it should ends long before
	defer cancel()
	if rt.access != "open" { // left before JSON is sent, so a slow client keeps nobody waiting; of streams maxLarge are fewer than places
		select {
		case s.working <- struct{}{}:
			defer func() { <-s.working }()
		case <-ctx.Done(): // nobody waits for the answer
			return c, "", ctx.Err()
		case <-time.After(lookupTimeout):
			return c, "", refusal(http.StatusServiceUnavailable, "The server is busy.")
		}
	}
	result, err := do(ctx)
	if err == nil && result != nil {
		answer = asJSON(result) + "\n"
	}
	return c, answer, err
}

// fail tells the client what it may know of err, unless something was sent already, and returns what the log may know.
func (w *response) fail(err error) (reason string) {
	e := &apiError{http.StatusInternalServerError, "Internal server error.", err.Error()}
	if unavailable(err) {
		e.status, e.message = http.StatusServiceUnavailable, "The database is not available."
	}
	errors.As(err, &e) // an apiError says itself what the client may know
	switch e.status {
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", "ApiKey")
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "1")
	}
	if w.status == 0 {
		detail := asJSON(map[string]string{"detail": e.message}) + "\n"
		_ = w.send(e.status, "application/json", []byte(detail), true) // it fails only when the client is gone
	}
	return cmp.Or(e.reason, e.message)
}

// body is what a request sends, unpacked. It is decoded while it arrives: a slow client holds only what it sent, as rows.
type body struct {
	io.Reader
	w       *response
	kind    string // its media type
	size    int    // bytes read so far
	refused error  // what Read returns if it cannot be read at all
}

// openBody returns the body, which is refused unless it is of one of types.
func openBody(w *response, r *http.Request, types ...string) *body {
	kind, options, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	encoding := strings.ToLower(r.Header.Get("Content-Encoding"))
	b := &body{Reader: r.Body, w: w, kind: kind}
	switch {
	case err != nil || !slices.Contains(types, kind) || !strings.EqualFold(cmp.Or(options["charset"], "utf-8"), "utf-8"):
		b.refused = refusal(http.StatusUnsupportedMediaType, "Content-Type: expected %s in UTF-8.", strings.Join(types, " or "))
	case encoding == "gzip":
		unpacked, err := gzip.NewReader(r.Body)
		b.Reader, b.refused = http.MaxBytesReader(w, unpacked, maxBody), inputError("body", err)
	case encoding != "" && encoding != "identity":
		b.refused = refusal(http.StatusUnsupportedMediaType, "Content-Encoding: expected gzip or none.")
	}
	return b
}

func (b *body) Read(p []byte) (n int, err error) {
	if b.refused = cmp.Or(b.refused, b.w.claimIf(b.size > largeBody)); b.refused != nil {
		return 0, b.refused // and no bytes: encoding/json would go on with them
	}
	n, err = io.ReadFull(b.Reader, p[:min(len(p), largeBody)]) // or encoding/json would look through white space anew at each packet
	if n > 0 && err == io.ErrUnexpectedEOF {
		err = nil // the next Read tells whether it is the end
	}
	b.size += n
	return n, err
}

// decodeJSON decodes the body of a request that takes nothing but JSON.
func decodeJSON(w *response, r *http.Request, c Caller, f fields) error {
	return cmp.Or(f.decodeJSON(openBody(w, r, "application/json")), fields{}.decodeQuery(r, c))
}

// fields says where the members of a request object, query parameters or the columns of a CSV go: name to pointer. What is
// not given keeps its value. In place of the pointer a list takes the elements of an array, or a repeated parameter.
type fields map[string]any

func (f fields) names() string { return strings.Join(slices.Sorted(maps.Keys(f)), ", ") }

// list takes one element. decode decodes it; other errors of a list name a member of it.
type list func(decode func(into any) error) error

// decodeJSON reads one JSON object and no more. Unlike encoding/json it refuses a member given twice or in another case.
func (f fields) decodeJSON(in io.Reader) error {
	dec := json.NewDecoder(in)
	dec.DisallowUnknownFields()
	err := walk(dec, '{', func(int) error {
		token, err := dec.Token()
		name, _ := token.(string) // inside an object Token returns a member's name here, or an error: no field is called ""
		into := f[name]
		delete(f, name)
		switch into := into.(type) {
		case nil:
			return cmp.Or(err, invalid("%s: unknown field, or given twice; there are also %s", name, f.names()))
		case list:
			return inputError(name, walk(dec, '[', func(i int) error { return elementError(name, i, into(dec.Decode)) }))
		}
		return inputError(name, dec.Decode(into))
	})
	if _, end := dec.Token(); err == nil && end != io.EOF {
		err = cmp.Or(end, errors.New("expected nothing after the object"))
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
var inWords = strings.NewReplacer("*", "", "[]main.label", "list of texts",
	"main.micros", "ISO 8601 timestamp such as 2025-01-31T12:00Z, of the years 1677 to 2262", "main.uuid", "UUID",
	"main.span", "duration such as PT36H, P1D or 90m", "main.expiry", "90d, 12h or a timestamp, to come", "bool", "true or false",
	"main.label", "text of 1 to 500 bytes without control characters", "main.prose", "text of at most 10,000 bytes",
	"main.number", "finite number or null", "main.uploadRow", "object", "main.rawJSON", "at most 1 MiB", "int64", "whole number of at least 1")

// inputError says what is wrong with the input at field. What says so already passes.
func inputError(field string, err error) error {
	if _, said := errors.AsType[*apiError](err); said || err == nil {
		return err
	}
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		field = strings.TrimSuffix(field+"."+inWords.Replace(e.Field), ".")
		return invalid("%s: expected %s, not %.40q", field, inWords.Replace(e.Type.String()), e.Value)
	}
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return refusal(http.StatusRequestEntityTooLarge, "The body is larger than %d bytes.", maxBody)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return refusal(http.StatusRequestTimeout, "The body did not arrive in time.")
	}
	if errors.Is(err, bufio.ErrTooLong) {
		return invalid("%s: expected lines of at most %d bytes", field, maxLine)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return invalid("%s: the input ends too early", field)
	}
	return invalid("%s: %s", field, strings.TrimPrefix(err.Error(), "json: "))
}

// elementError says what is wrong with the i-th element of a list.
func elementError(list string, i int, err error) error {
	if err == nil {
		return nil
	}
	place := fmt.Sprintf("%s[%d]", list, i)
	if e, ok := errors.AsType[*apiError](err); ok && e.status == 422 { // others are not about this element
		return invalid("%s.%s", place, e.message)
	}
	return inputError(place, err)
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
		if _, isList := into.(list); into == nil || len(values) > 1 && !isList {
			return invalid("%s: unknown parameter, or given twice; there are %s", name, f.names())
		}
		for _, value := range values {
			err = cmp.Or(err, inputError(name, setField(into, []byte(value))))
		}
	}
	return cmp.Or(err, checkTenant(c, tenant))
}

// setField parses the text of a query parameter or of a cell into what the pointer points to, or for the list.
func setField(into any, text []byte) (err error) {
	switch into := into.(type) {
	case list:
		return into(func(element any) error { return setField(element, text) })
	case encoding.TextUnmarshaler:
		return into.UnmarshalText(text)
	case *bool:
		*into, err = strconv.ParseBool(string(text))
		return expect[bool](err == nil, text)
	case *int64:
		*into, err = strconv.ParseInt(string(text), 10, 64)
		return expect[int64](err == nil && *into >= 1, text)
	}
	return json.Unmarshal(text, into)
}

// checkTenant refuses a tenant_id that is not the caller's: it never changes whom a request acts for.
func checkTenant(c Caller, id uuid) error {
	if id == "" || string(id) == c.tenant {
		return nil
	}
	return refusal(http.StatusForbidden, "tenant_id is not the tenant of this API key.")
}

// getPage sends a file of web/. In a browser nothing runs in it but its own script, which is known by its digest.
func getPage(name, contentType string) func(*response, *http.Request, Caller) (work, error) {
	text, err := web.ReadFile("web/" + name)
	policy := "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
	for _, inline := range regexp.MustCompile(`(?s)<(script|style)>(.*?)</(?:script|style)>`).FindAllSubmatch(text, -1) {
		digest := sha256.Sum256(inline[2])
		policy += fmt.Sprintf("; %s-src 'sha256-%s'", inline[1], base64.StdEncoding.EncodeToString(digest[:]))
	}
	return func(w *response, _ *http.Request, _ Caller) (work, error) {
		w.Header().Set("Content-Security-Policy", policy)
		return func(context.Context) (any, error) { return nil, w.send(http.StatusOK, contentType, text, true) }, err
	}
}

func (s *server) getHealth(*response, *http.Request, Caller) (work, error) {
	return func(ctx context.Context) (any, error) {
		ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
		defer cancel()
		_, err := s.health(ctx)
		return map[string]string{"status": "ok"}, err
	}, nil
}

func (s *server) postSeries(w *response, r *http.Request, c Caller) (work, error) {
	name, unit, description := label(""), label(defaultUnit), prose("")
	err := decodeJSON(w, r, c, fields{"name": &name, "description": &description, "unit": &unit})
	return func(ctx context.Context) (any, error) {
		id, created, err := s.store.CreateSeries(ctx, c, name, unit, description)
		message := map[bool]string{true: "Series created successfully", false: "Series already exists"}[created]
		return map[string]string{"series_id": id, "message": message}, err
	}, cmp.Or(err, invalidIf(name == "", "name is required"))
}

func (s *server) getSeries(_ *response, r *http.Request, c Caller) (work, error) {
	return func(ctx context.Context) (any, error) { return s.store.SeriesByID(ctx, c) }, fields{}.decodeQuery(r, c)
}

func (s *server) getRuns(_ *response, r *http.Request, c Caller) (work, error) {
	workflow, start, end, limit := label(""), firstTime, lastTime, int64(1000)
	err := fields{"workflow_id": &workflow, "start_known": &start, "end_known": &end, "limit": &limit}.decodeQuery(r, c)
	err = cmp.Or(err, invalidIf(end <= start, "end_known: expected a time after start_known"),
		invalidIf(limit > maxRuns, "limit: expected at most %d", maxRuns))
	return func(ctx context.Context) (any, error) { return s.store.Runs(ctx, c, workflow, start, end, limit) }, err
}

// uploadRow is one of value_rows.
type uploadRow struct {
	ValidTime    micros `json:"valid_time"`
	ValidTimeEnd micros `json:"valid_time_end"`
	SeriesID     uuid   `json:"series_id"`
	ValueKey     label  `json:"value_key"`
	Value        number `json:"value"`
}

// add takes one of value_rows: it is their list.
func (u *upload) add(decode func(into any) error) error {
	row := &u.row
	*row = uploadRow{Value: notGiven}
	err := decode(row)
	ref := seriesRef{ID: row.SeriesID, Key: row.ValueKey}
	err = cmp.Or(err, invalidIf(row.Value == notGiven, "value is required (a number or null)"),
		checkTimes(row.ValidTime, row.ValidTimeEnd), invalidIf(ref == seriesRef{}, "value_key or series_id is required"))
	if err == nil {
		u.points[ref] = append(u.points[ref], point{row.ValidTime, row.ValidTimeEnd, float64(row.Value)})
		u.rows++
		err = invalidIf(len(u.points) > maxSeries, "series: expected at most %d in one upload", maxSeries)
	}
	return err
}

// checkTimes checks the times of a value. An end of 0 is none.
func checkTimes(time, end micros) error {
	return cmp.Or(invalidIf(time == 0, "valid_time is required"),
		invalidIf(end != 0 && end <= time, "valid_time_end: expected a time after valid_time"))
}

// decodeCSV takes rows under a header line, in which the columns may have any order.
func (u *upload) decodeCSV(in io.Reader) error {
	columns := fields{"valid_time": &u.row.ValidTime, "value_key": &u.row.ValueKey, "value": &u.row.Value,
		"valid_time_end": &u.row.ValidTimeEnd, "series_id": &u.row.SeriesID}
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxLine+1)
	lines.Scan()
	// Excel marks UTF-8 by a U+FEFF. Without any line the header is one empty name, which is refused below.
	cells, err := appendCells(nil, bytes.TrimPrefix(lines.Bytes(), []byte("\ufeff")))
	if err = cmp.Or(lines.Err(), err); err != nil {
		return inputError("header", err)
	}
	header, into := make([]string, len(cells)), make([]any, len(cells))
	for i, name := range cells {
		header[i] = string(name)
		if into[i] = columns[header[i]]; into[i] == nil {
			return invalid("header: %.40q is no column, or given twice; there are %s", name, columns.names())
		}
		delete(columns, header[i])
	}
	if columns["valid_time"] != nil || columns["value"] != nil || columns["value_key"] != nil && columns["series_id"] != nil {
		return invalid("header: expected valid_time, value, and value_key or series_id")
	}
	decode := func(any) (err error) { // into u.row, as the columns are bound
		cells, err = appendCells(cells[:0], lines.Bytes())
		if err == nil && len(cells) != len(header) {
			err = fmt.Errorf("expected %d cells, as in the header", len(header))
		}
		for i, cell := range cells {
			if err == nil && (len(cell) > 0 || header[i] == "value") { // an empty value is NULL, another empty cell not given
				err = inputError(header[i], setField(into[i], cell))
			}
		}
		return err
	}
	n := 2
	for ; err == nil && lines.Scan(); n++ {
		if len(lines.Bytes()) > 0 {
			err = elementError("line", n, u.add(decode))
		}
	}
	return inputError(fmt.Sprintf("line[%d]", n), cmp.Or(lines.Err(), err)) // a line that was cut short is not what is wrong
}

// appendCells appends the cells of a line of CSV. Quotes, which are rare, it leaves to encoding/csv.
func appendCells(cells [][]byte, line []byte) ([][]byte, error) {
	if !bytes.ContainsRune(line, '"') {
		return slices.AppendSeq(cells, bytes.SplitSeq(line, []byte{','})), nil
	}
	record, err := csv.NewReader(bytes.NewReader(line)).Read()
	for _, text := range record {
		cells = append(cells, []byte(text))
	}
	return cells, errors.Unwrap(err) // without what a csv.ParseError adds: line 1, as each is read by itself
}

func (s *server) postUpload(w *response, r *http.Request, c Caller) (work, error) {
	u, tenant, descriptions := &upload{workflowID: "api-workflow", points: map[seriesRef][]point{}}, uuid(""), rawJSON("{}")
	f := fields{"run_id": &u.runID, "workflow_id": &u.workflowID, "run_start_time": &u.start, "run_finish_time": &u.finish,
		"known_time": &u.known, "run_params": &u.params, "series_descriptions": &descriptions}
	b, digest := openBody(w, r, "application/json", "text/csv"), sha256.New()
	in := io.TeeReader(b, digest)
	var err error
	if b.kind == "text/csv" {
		err = cmp.Or(f.decodeQuery(r, c), u.decodeCSV(in))
	} else {
		f["tenant_id"], f["value_rows"] = &tenant, list(u.add)
		err = cmp.Or(f.decodeJSON(in), fields{}.decodeQuery(r, c))
	}
	fmt.Fprintf(digest, "%s?%s", b.kind, r.URL.Query().Encode())
	digest.Sum(u.digest[:0])
	return func(ctx context.Context) (any, error) {
		ids, err := s.store.Upload(ctx, c, u)
		return map[string]any{"run_id": u.runID, "message": "Run created successfully", "series_ids": ids, "rows_inserted": u.rows}, err
	}, cmp.Or(err, inputError("series_descriptions", json.Unmarshal(descriptions, &u.descriptions)), checkTenant(c, tenant), u.check())
}

// check checks what is not a row.
func (u *upload) check() error {
	params := *cmp.Or(u.params, new(json.RawMessage("{}")))
	err := cmp.Or(invalidIf(u.start == 0, "run_start_time is required"),
		invalidIf(u.finish != 0 && u.finish < u.start, "run_finish_time: expected a time not before run_start_time"),
		invalidIf(params[0] != '{' || len(params) > maxParams, "run_params: expected a JSON object of at most %d bytes", maxParams))
	for key := range u.descriptions {
		err = cmp.Or(err, invalidIf(u.points[seriesRef{Key: key}] == nil, "series_descriptions: no row has the value_key %q", key))
	}
	return err
}

// decodeUpdate reads one of updates: whose value it corrects, and the members as correct_values takes them. Absent keeps what
// is there and null clears it, so what is absent stays absent. Tags get the form in which they are stored.
func decodeUpdate(c Caller, text rawJSON) (ref seriesRef, update map[string]any, err error) {
	var time micros
	var tenant uuid
	var tags []label
	end := new(micros) // nil after null, as are known_time and run_id
	update = fields{"valid_time": &time, "valid_time_end": &end, "known_time": new(*micros), "run_id": new(*uuid), "tenant_id": &tenant,
		"series_id": &ref.ID, "series_key": &ref.Key, "value": new(number), "annotation": new(prose), "tags": &tags}
	absent := maps.Clone(update)
	err = fields(absent).decodeJSON(bytes.NewReader(text))
	maps.DeleteFunc(update, func(name string, _ any) bool { return absent[name] != nil })
	err = cmp.Or(err, invalidIf(len(tags) > maxTags || slices.Contains(tags, ""), // "": a null among them
		"tags: expected at most %d texts", maxTags))
	for i, tag := range tags {
		tags[i] = label(strings.ToLower(strings.TrimSpace(string(tag))))
	}
	slices.Sort(tags)
	tags = slices.Compact(tags)
	changesNothing := update["value"] == nil && update["annotation"] == nil && update["tags"] == nil
	return ref, update, cmp.Or(err, invalidIf(changesNothing, "value, annotation or tags is required"),
		checkTimes(time, *cmp.Or(end, new(micros))),
		invalidIf(ref == seriesRef{}, "series_key or series_id is required"), checkTenant(c, tenant))
}

func (s *server) putValues(w *response, r *http.Request, c Caller) (work, error) {
	refs, updates := []seriesRef{}, []map[string]any{}
	err := decodeJSON(w, r, c, fields{"updates": list(func(decode func(into any) error) error {
		var text rawJSON
		broken := decode(&text)
		ref, update, err := decodeUpdate(c, text)
		refs, updates = append(refs, ref), append(updates, update)
		return cmp.Or(broken, invalidIf(len(updates) > maxUpdates, "expected at most %d updates", maxUpdates), err)
	})})
	return func(ctx context.Context) (any, error) { return s.store.UpdateValues(ctx, c, refs, updates) }, cmp.Or(err, w.claimIf(true))
}

func (s *server) getValues(w *response, r *http.Request, c Caller) (work, error) {
	if !r.ProtoAtLeast(1, 1) {
		return nil, refusal(http.StatusHTTPVersionNotSupported, "HTTP/1.0 cannot tell a broken answer from a complete one: use HTTP/1.1.")
	}
	q, out := anyValue, &rowWriter{w: w}
	mode, format := label("flat"), map[bool]label{true: "csv", false: "json"}[strings.Contains(r.Header.Get("Accept"), "text/csv")]
	err := fields{"start_valid": &q.start, "end_valid": &q.end, "start_known": &q.startKnown, "end_known": &q.endKnown,
		"mode": &mode, "all_versions": &q.allVersions, "as_of": &q.asOf, "lead": &q.lead, "bucket": &q.bucket, "agg": &q.agg,
		"series_id":  list(func(decode func(into any) error) error { return decode(&q.add().ID) }),
		"series_key": list(func(decode func(into any) error) error { return decode(&q.add().Key) }),
		"detail":     &out.detail, "limit": &out.limit, "format": &format}.decodeQuery(r, c)
	q.overlapping, out.detail = mode == "overlapping", out.detail || q.allVersions
	out.csv, out.overlapping = format == "csv", q.overlapping
	err = cmp.Or(err,
		invalidIf(mode != "flat" && mode != "overlapping", "mode: expected flat or overlapping"),
		invalidIf(format != "json" && format != "csv", "format: expected json or csv"),
		invalidIf((q.bucket == 0) != (q.agg == ""), "bucket and agg: expected both or none, and a bucket longer than nothing"),
		invalidIf(q.bucket != 0 && (q.overlapping || out.detail), "bucket: aggregates only what mode=flat shows, without detail or all_versions"),
		invalidIf(!slices.Contains([]label{"", "mean", "min", "max", "sum", "count"}, q.agg), "agg: expected mean, min, max, sum or count"),
		invalidIf(q.end <= q.start, "end_valid: expected a time after start_valid"),
		invalidIf(q.endKnown <= q.startKnown, "end_known: expected a time after start_known"))
	return func(ctx context.Context) (any, error) {
		out.start()
		if err := s.store.Read(ctx, c, q, out.row); err != nil && err != errEnough {
			return nil, err
		}
		return nil, out.flush(true)
	}, cmp.Or(err, w.claimIf(q.bucket > 0 || q.lead >= 0)) // which read much to say little
}

// rowWriter streams values as JSON or CSV. What fails before flushBytes are full was not sent yet, and gets a proper status.
type rowWriter struct {
	w                        *response
	limit                    int64 // 0: none
	csv, overlapping, detail bool
	quote, null              string // around a time; for NULL
	opening, ending          string // of a row
	buf, scratch             []byte
	count                    int64
	series                   *series // of the last row, and its texts as they are written; nil: at a CSV's header
	id, key, unit            []byte
}

var errEnough = errors.New("limit reached") // which ends a read

// start writes what stands before the rows.
func (o *rowWriter) start() {
	if o.csv {
		o.ending = "\n"
		o.cells(&element{from: &version{}})
		return
	}
	o.quote, o.null, o.opening, o.ending, o.buf = `"`, "null", "{", "},", []byte(`{"data":[`)
}

// row writes one row; the limit-th returns errEnough.
func (o *rowWriter) row(e *element) error {
	if len(o.buf) >= flushBytes { // before the row: of the last one flush has to take the comma away
		if err := o.w.claimIf(true); err != nil {
			return err
		}
		if err := o.flush(false); err != nil {
			return err
		}
	}
	if x := e.from.of; x != o.series {
		o.series, o.id, o.key, o.unit = x, []byte(o.quote+x.ID+o.quote), o.text(x.Key), o.text(x.Unit)
	}
	o.cells(e)
	if o.count++; o.count == o.limit {
		return errEnough
	}
	return nil
}

// cells writes a row. Each cell ends with a comma, and the last one's gives way to the row's end.
func (o *rowWriter) cells(e *element) {
	o.buf = append(o.buf, o.opening...)
	if o.overlapping {
		o.cell("known_time", o.time(e.from.Known))
	}
	o.cell("valid_time", o.time(e.time))
	o.cell("series_id", o.id)
	o.scratch = appendNumber(o.scratch[:0], e.value, o.null)
	o.cell("value", o.scratch)
	o.cell("series_key", o.key)
	o.cell("series_unit", o.unit)
	if o.detail {
		o.cell("run_id", o.text(e.from.RunID))
	}
	if o.detail && !o.overlapping {
		o.cell("known_time", o.time(e.from.Known))
	}
	if o.detail || o.csv || e.end != 0 { // rows of a CSV cannot differ
		o.cell("valid_time_end", o.time(e.end))
	}
	if o.detail {
		o.cell("change_time", o.time(e.from.Change))
		o.cell("changed_by", o.text(e.from.ChangedBy))
		o.cell("annotation", o.text(e.from.Annotation))
		o.cell("tags", o.text(e.from.Tags))
		o.cell("version", strconv.AppendInt(nil, int64(e.from.Number), 10))
	}
	o.buf = append(o.buf[:len(o.buf)-1], o.ending...)
}

// cell writes a member, or of a header its name: in the other rows of a CSV its place tells the name.
func (o *rowWriter) cell(name string, value []byte) {
	switch {
	case o.series == nil:
		value = []byte(name)
	case !o.csv:
		o.buf = append(append(append(o.buf, '"'), name...), `":`...)
	}
	o.buf = append(append(o.buf, value...), ',')
}

// time returns t as it is written, until scratch is used again.
func (o *rowWriter) time(t micros) []byte {
	if t == 0 {
		return []byte(o.null)
	}
	o.scratch = append(t.append(append(o.scratch[:0], o.quote...)), o.quote...)
	return o.scratch
}

// text returns a string, or a list of strings, which in a CSV stays JSON.
func (o *rowWriter) text(v any) []byte {
	text := asJSON(v)
	if text == "null" {
		text = o.null
	} else if o.csv {
		_ = json.Unmarshal([]byte(text), &text) // a list stays as it is
		text = `"` + strings.ReplaceAll(text, `"`, `""`) + `"`
	}
	return []byte(text)
}

// flush sends what is buffered; at last with what stands after the rows of a complete response.
func (o *rowWriter) flush(last bool) error {
	if last && !o.csv {
		o.buf = fmt.Appendf(bytes.TrimSuffix(o.buf, []byte(",")), "],\"count\":%d}\n", o.count)
	}
	err := o.w.send(http.StatusOK, map[bool]string{true: "text/csv; charset=utf-8", false: "application/json"}[o.csv], o.buf, last)
	o.buf = o.buf[:0]
	return err
}

// ---- Types of values in requests. They know what they accept, wherever it stands: JSON, query, CSV or command line.

// expect returns an error for a text that is no T unless ok, in the form that lets encoding/json add the field's name.
func expect[T any](ok bool, text []byte) error {
	if ok {
		return nil
	}
	return &json.UnmarshalTypeError{Value: string(text), Type: reflect.TypeFor[T]()}
}

// micros counts microseconds from the first day of year 1 UTC, where time.Time begins too. Zero is no time: not given, NULL.
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

func (m micros) String() string               { return string(m.append(nil)) }
func (m micros) MarshalText() ([]byte, error) { return m.append(nil), nil }

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
	return expect[micros](false, text)
}

// span is a duration of less than 293 years, as ISO 8601 (P1DT12H; no months or years, whose length differs), as Go writes
// it (36h) or in days (90d). What is finer than a microsecond is cut off.
type span micros

var isoSpan = regexp.MustCompile(`^P?(?:(\d{1,5})W)?(?:(\d{1,6})[Dd])?(?:T([0-9.HMS]+))?$`)

func (d *span) UnmarshalText(text []byte) error {
	s := string(text)
	if m := isoSpan.FindStringSubmatch(s); m != nil && len(s) > 1 {
		weeks, _ := strconv.Atoi(m[1]) // digits or nothing
		days, _ := strconv.Atoi(m[2])
		s = fmt.Sprintf("%dh%s", 24*(7*weeks+days), strings.ToLower(m[3]))
	}
	length, err := time.ParseDuration(s)
	*d = span(length.Microseconds())
	return expect[span](err == nil && *d >= 0, text)
}

// expiry is a time to come: a timestamp, or a span from now on. Zero is never.
type expiry micros

func (e *expiry) UnmarshalText(text []byte) error {
	now, after := unixEpoch+micros(time.Now().UnixMicro()), span(0)
	err := after.UnmarshalText(text)
	if *e = expiry(now + micros(after)); err != nil {
		err = (*micros)(e).UnmarshalText(text)
	}
	return expect[expiry](err == nil && micros(*e) > now, text)
}

// uuid is in lower case.
type uuid string

var uuidPattern = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

func (u *uuid) UnmarshalText(text []byte) error {
	*u = uuid(strings.ToLower(string(text)))
	return expect[uuid](uuidPattern.MatchString(string(*u)), text)
}

// rawJSON is JSON that is decoded later. It is bounded before that, as a list or object of many small things takes much memory.
type rawJSON []byte

func (j *rawJSON) UnmarshalJSON(b []byte) error {
	if len(b) <= largeBody {
		*j = bytes.Clone(b)
	}
	return expect[rawJSON](len(b) <= largeBody, b[:min(len(b), 40)])
}

// label is a key, unit, workflow_id, e-mail address or tag; PostgreSQL indexes keys up to some 2,700 bytes.
type label string

func (l *label) UnmarshalText(text []byte) error {
	*l = label(text)
	return expect[label](len(text) <= 500 && len(bytes.TrimSpace(text)) > 0 && !bytes.ContainsFunc(text, unprintable), text)
}

// unprintable is true of control characters and of what stands for bytes that are not UTF-8.
func unprintable(r rune) bool { return r == unicode.ReplacementChar || unicode.IsControl(r) }

// prose is a description or annotation, without white space around it.
type prose string

func (p *prose) UnmarshalText(text []byte) error {
	*p = prose(bytes.TrimSpace(text))
	bad := func(r rune) bool { return unprintable(r) && !strings.ContainsRune("\t\r\n", r) }
	return expect[prose](len(text) <= 10_000 && !bytes.ContainsFunc(text, bad), text)
}

// number is a value: any float64 but infinity, or NULL, which is NaN.
type number float64

var notGiven = number(math.Inf(1))

func (n number) MarshalJSON() ([]byte, error) { return appendNumber(nil, float64(n), "null"), nil }

func (n *number) UnmarshalJSON(b []byte) error {
	return n.UnmarshalText(bytes.TrimPrefix(b, []byte("null")))
}

// UnmarshalText takes nothing and NaN for NULL.
func (n *number) UnmarshalText(text []byte) error {
	s := cmp.Or(string(text), "NaN")
	f, err := strconv.ParseFloat(s, 64)
	*n = number(f)
	misspelt := math.IsNaN(f) && s != "NaN" || strings.ContainsAny(s, "xX_") // nan, hexadecimal, or 1_000
	return expect[number](err == nil && !math.IsInf(f, 0) && !misspelt, text)
}

// appendNumber writes f so that it reads as a float: 20.0, not 20. NaN is written as null says.
func appendNumber(b []byte, f float64, null string) []byte {
	switch abs := math.Abs(f); {
	case math.IsNaN(f):
		return append(b, null...)
	case abs != 0 && (abs < 1e-4 || abs >= 1e16):
		return strconv.AppendFloat(b, f, 'e', -1, 64)
	case f == math.Trunc(f):
		return append(strconv.AppendFloat(b, f, 'f', -1, 64), ".0"...)
	}
	return strconv.AppendFloat(b, f, 'f', -1, 64)
}
