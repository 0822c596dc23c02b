package main

// HTTP. In this order: limits, errors and their statuses, routes, the way to a handler, answers,
// bodies, parameters, handlers, rows.

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"embed"
	"encoding"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"os"
	"path"
	"reflect"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
)

//go:embed web
var web embed.FS // what is served as it is, to everyone

const (
	readHeaderTimeout = 10 * time.Second
	readTimeout       = 2 * time.Minute  // lets a slow line send a full body
	writeTimeout      = 30 * time.Second // anew for each piece of an answer
	idleTimeout       = 2 * time.Minute  // of a connection between requests
	drainTimeout      = 30 * time.Second // for running requests after SIGTERM
	refusedTimeout    = 10 * time.Second // for a client to end sending what was refused already
	healthTimeout     = 5 * time.Second  // for the database's answer to GET /healthz

	// maxConnections are held at a time: while a long URL and headers arrive, each takes some
	// 150 KiB. Those beyond are closed as soon as they come. One of HTTP/2 has at most maxStreams
	// requests.
	maxConnections = 1200
	maxStreams     = 50

	maxURL         = 64 << 10  // 400 keys of series of 150 bytes each
	maxHeaders     = 16 << 10  // without the request line
	maxBody        = 64 << 20  // as it is sent, and unpacked; some 600,000 rows as JSON
	maxElement     = 64 << 10  // of a body: a row, an update, a name or a text
	maxLine        = 4 << 10   // of a CSV
	maxRows        = 1_000_000 // of one upload: more is better sent in several
	maxSeries      = 100_000   // of one upload: each takes some hundred bytes, whatever its rows
	maxUpdates     = 10_000    // of PUT /values: they hold a lock together
	maxTags        = 100       // of one value
	maxPatterns    = 20        // of match: each is compared with every key
	maxRuns        = 10_000    // of GET /runs
	maxCorrections = 10_000    // of GET /corrections, which can be paged

	// Lines a minute that the log has at most on requests that act for nobody: of one address and
	// status; and of one dead key from there, because whether a leaked key is still tried must not
	// vanish in a flood of others.
	addressLines = 300
	deadKeyLines = 60

	flushBytes = 64 << 10 // of a stream are sent at a time
	smallBytes = 8 << 10  // are a small answer; the memory for a larger one grows
	minGzip    = 16 << 10 // bytes of an answer: a smaller one is sent sooner than it is compressed

	// memoryTotal is what all requests together may hold in bodies, decoded rows, what is being
	// merged and answers that are not sent yet. A tenant has a quarter of it.
	memoryTotal  = 320 << 20
	tenantMemory = memoryTotal / 4
	// What a request holds at least, what one with a body does that is not short (which also bounds
	// how many bodies a tenant can have decoded at once), and what the parts of a body take once
	// they are decoded, in bytes.
	requestBytes   = 512 << 10
	bodyBytes      = 2 << 20
	rowBytes       = 64 // twice, and what a growing list takes more
	newSeriesBytes = 400
	keyCopies      = 10 // of each key, as text and in JSON for the database and for the answer
	updateBytes    = 600
)

// ---- Errors

// Kinds of errors that only HTTP has.
const (
	tooSlow     errorKind = "too slow"
	unsupported errorKind = "unsupported"
	wrongMethod errorKind = "wrong method"
	oldProtocol errorKind = "old protocol"
	longURL     errorKind = "long URL"
	longHeaders errorKind = "long headers"
)

// statuses are those of the kinds of refusals and denials. No other place names one of an error,
// but for those that errorAnswer has for what nobody has foreseen.
var statuses = map[any]int{
	noKeyGiven:     http.StatusUnauthorized,
	badKeyGiven:    http.StatusUnauthorized,
	tooManyBadKeys: http.StatusTooManyRequests,
	foreignHost:    http.StatusForbidden,
	crossOrigin:    http.StatusForbidden,
	forbidden:      http.StatusForbidden,
	usersUnknown:   http.StatusServiceUnavailable,
	usersRequired:  http.StatusServiceUnavailable,
	busy:           http.StatusServiceUnavailable,
	invalidInput:   http.StatusUnprocessableEntity,
	notFound:       http.StatusNotFound,
	conflict:       http.StatusConflict,
	wrongMethod:    http.StatusMethodNotAllowed,
	tooLarge:       http.StatusRequestEntityTooLarge,
	tooSlow:        http.StatusRequestTimeout,
	unsupported:    http.StatusUnsupportedMediaType,
	oldProtocol:    http.StatusHTTPVersionNotSupported,
	longURL:        http.StatusRequestURITooLong,
	longHeaders:    http.StatusRequestHeaderFieldsTooLarge,
}

func statusOf(kind any) int { return cmp.Or(statuses[kind], http.StatusInternalServerError) }

// errorAnswer is what the client and the log are told of an error.
type errorAnswer struct {
	status int
	detail string // for the client
	reason string // for the log, without any text of the request or of a row
	denied denial // what the log is told of a key
}

// answerTo returns what may be told of err. Of a bug or a failing database clients learn nothing.
func answerTo(err error) errorAnswer {
	var refused *refusal
	var denied *denial
	switch {
	case errors.As(err, &refused):
		return errorAnswer{statusOf(refused.kind), refused.message, refused.reason, denial{}}
	case errors.As(err, &denied):
		return errorAnswer{statusOf(denied.kind), denied.Error(), denied.reason, *denied}
	case unavailable(err):
		return errorAnswer{statusOf(usersUnknown), string(usersUnknown), causeOf(err), denial{}}
	}
	return errorAnswer{statusOf(nil), "Internal server error.", causeOf(err), denial{}}
}

// inputError says what is wrong with the input at field. A refusal says so already.
func inputError(field string, err error) error {
	var refused *refusal
	var misfit *json.UnmarshalTypeError
	var tooLong *http.MaxBytesError
	switch {
	case err == nil || errors.As(err, &refused):
		return err
	case errors.As(err, &misfit):
		if misfit.Field != "" {
			field += "." + misfit.Field
		}
		return invalid("%s: expected %s, not %.40q", field, expectation(misfit.Type), misfit.Value)
	case errors.As(err, &tooLong):
		return refuse(tooLarge, "The body is larger than %d bytes.", maxBody)
	case errors.Is(err, errTooLong):
		return refuse(tooLarge, "%s: expected rows, names and texts of at most %d bytes",
			field, maxElement)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return refuse(tooSlow, "The body did not arrive in time.")
	case errors.Is(err, bufio.ErrTooLong):
		return invalid("%s: expected lines of at most %d bytes", field, maxLine)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return invalid("%s: the input ends too early", field)
	}
	text := strings.TrimPrefix(err.Error(), "json: ")
	if strings.Contains(text, "character 'N'") || strings.Contains(text, "character 'I'") {
		text += ": in place of NaN or Infinity send null"
	}
	return invalid("%s: %s", field, text)
}

// expectation says which texts a type takes.
func expectation(t reflect.Type) string {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if w, ok := reflect.Zero(t).Interface().(word); ok {
		return w.expected()
	}
	switch t.Kind() {
	case reflect.Slice:
		return "list of texts"
	case reflect.Bool:
		return boolean(false).expected()
	}
	return "an object"
}

// refuseElement says what is wrong with the i-th element of a list.
func refuseElement(list string, i int, err error) error {
	where := fmt.Sprintf("%s[%d]", list, i)
	var refused *refusal
	switch {
	case !errors.As(err, &refused):
		return inputError(where, err)
	case refused.kind == invalidInput:
		return prefix(where+".", err)
	}
	return err // which is not about this element
}

// ---- Routes

// access is what a route asks of a key.
type access int

const (
	writes access = iota // a key that may write
	reads                // a key
	open                 // nothing: the route holds no data
)

// route is one line of the route table. handle reads the request, asks the store, and sends.
type route struct {
	pattern string
	access  access
	handle  func(w *response, r *http.Request, c Caller) error
}

func (s *server) routes() []route {
	return []route{
		{"GET /{$}", open, sendFile("root.json", "application/json")},
		{"GET /openapi.json", open, sendFile("openapi.json", "application/json")},
		{"GET /docs", open, sendFile("docs.html", "text/html; charset=utf-8")},
		{"GET /docs/{file}", open, sendPageFile},
		{"GET /healthz", open, s.getHealth},
		{"POST /upload", writes, s.postUpload},
		{"GET /values", reads, s.getValues},
		{"PUT /values", writes, s.putValues},
		{"POST /series", writes, s.postSeries},
		{"GET /list_timeseries", reads, s.getSeries},
		{"GET /runs", reads, s.getRuns},
		{"POST /runs/{run_id}/withdraw", writes, s.postWithdrawal},
		{"GET /corrections", reads, s.getCorrections},
	}
}

// server serves HTTP. It keeps no state that another server of the same database would have to
// know.
type server struct {
	store  *store
	health keyStore // asked whether the database answers; it has a connection of its own
	auth   *authenticator
	log    *slog.Logger
	memory *shares
	lines  tally // in the log, of requests that act for nobody

	mux       *http.ServeMux // which only finds patterns
	byPattern map[string]route
	methods   map[string]string // that a path takes
}

func newServer(st *store, health keyStore, auth *authenticator,
	log *slog.Logger) *server {
	s := &server{
		store:     st,
		health:    health,
		auth:      auth,
		log:       log,
		memory:    newShares(memoryTotal, tenantMemory),
		mux:       http.NewServeMux(),
		byPattern: map[string]route{},
		methods:   map[string]string{},
	}
	s.lines.ended = s.logRest
	for _, rt := range s.routes() {
		s.mux.Handle(rt.pattern, http.NotFoundHandler())
		s.byPattern[rt.pattern] = rt
		method, path, _ := strings.Cut(rt.pattern, " ")
		if method == "GET" {
			method = "GET, HEAD"
		}
		if s.methods[path] == "" {
			s.mux.Handle(path, http.NotFoundHandler()) // by any other method
			s.methods[path] = method
		} else {
			s.methods[path] += ", " + method
		}
	}
	return s
}

// find returns the route of a request, and the methods that its path takes: none if the path is
// unknown. A path that ServeMux would redirect, such as //values, counts as unknown.
func (s *server) find(r *http.Request) (rt route, known bool, methods string) {
	_, pattern := s.mux.Handler(r)
	file, ofPage := strings.CutPrefix(r.URL.Path, "/docs/")
	isNoFile := ofPage && pageFiles[file] == ""
	if path.Clean(r.URL.Path) != r.URL.Path || isNoFile {
		return route{}, false, ""
	}
	rt, known = s.byPattern[pattern]
	return rt, known, s.methods[pattern]
}

// ---- The way to a handler

// ServeHTTP answers and logs one request. A response that fails after it began breaks the
// connection: it must not look complete.
func (s *server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	begin := time.Now()
	w := &response{rw: rw, accepts: r.Header.Get("Accept-Encoding")}
	caller, err := s.serve(w, r)
	broken := err != nil && w.status != 0
	var told errorAnswer
	if err != nil {
		told = answerTo(err)
	}
	if err != nil && !broken {
		w.sendError(told)
	}
	level := slog.LevelInfo
	if (broken || w.status >= 500) && r.Context().Err() == nil { // the client is still there
		level = slog.LevelError
	}
	if caller.tenant != "" || s.hasLine(r, w.status, told.denied) {
		s.log.Log(r.Context(), level, "request",
			"route", w.route, "status", w.status, "broken", broken, "reason", told.reason,
			"remote", r.RemoteAddr, "tenant", caller.tenant,
			"key_id", cmp.Or(caller.keyID, told.denied.keyID),
			"duration", time.Since(begin).Round(time.Microsecond))
	}
	if broken {
		panic(http.ErrAbortHandler)
	}
}

// hasLine tells whether the log has a line for a request that acts for nobody.
func (s *server) hasLine(r *http.Request, status int, denied denial) bool {
	from := source{address: addressOf(r), status: status}
	if denied.isKey {
		from = source{address: from.address, keyID: denied.keyID} // whether it got 401 or 429
	}
	return s.lines.add(from) <= maxLines(from)
}

// maxLines is how many lines a minute there are at most on such requests of one source.
func maxLines(from source) int {
	if from.keyID != "" {
		return deadKeyLines
	}
	return addressLines
}

// logRest logs how many requests of a minute got no line.
func (s *server) logRest(from source, count int) {
	if rest := count - maxLines(from); rest > 0 {
		s.log.Warn("requests without a line", "count", rest, "status", from.status,
			"remote", from.address, "key_id", from.keyID)
	}
}

// connectionLog is for what net/http says of connections, such as a failed handshake of TLS: in a
// minute as many lines as requests of one address have.
type connectionLog struct{ *server }

func (l connectionLog) Write(text []byte) (int, error) {
	from := source{address: "net/http"}
	isFlood := bytes.Contains(text, []byte("TLS handshake error")) // which anyone can make
	if !isFlood || l.lines.add(from) <= maxLines(from) {
		l.log.Warn(strings.TrimSpace(string(text)))
	}
	return len(text), nil
}

// serve is the only way to a handler: it authenticates, then looks whether the path exists, then
// checks access.
func (s *server) serve(w *response, r *http.Request) (c Caller, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	w.header().Set("Cache-Control", "no-store")
	w.header().Set("X-Content-Type-Options", "nosniff")
	if err := checkLengths(r); err != nil {
		return c, err
	}
	rt, known, methods := s.find(r)
	w.route = cmp.Or(rt.pattern, "none")
	if known && rt.access == open {
		return c, rt.handle(w, r, c)
	}
	c, err = s.auth.authenticate(r)
	if err != nil {
		return c, err
	}
	if !known && methods == "" {
		return c, refuse(notFound, "There is nothing at this path.")
	}
	if !known {
		w.header().Set("Allow", methods)
		return c, refuse(wrongMethod, "This path takes %s.", methods)
	}
	if rt.access == writes && c.readOnly {
		return c, refuse(forbidden, "This API key is read-only.")
	}
	r.Body = http.MaxBytesReader(w.rw, r.Body, maxBody)
	err = s.handle(rt, w, r, c)
	if err != nil && r.Header.Get("Expect") == "" {
		// A client that is still sending would not see the answer. What it sends is of no interest,
		// and no error of it either. By now the request holds nothing.
		_ = http.NewResponseController(w.rw).SetReadDeadline(time.Now().Add(refusedTimeout))
		_, _ = io.Copy(io.Discard, r.Body)
	}
	return c, err
}

// checkLengths refuses a URL or headers that are too long. net/http bounds them only together.
func checkLengths(r *http.Request) error {
	if len(r.RequestURI) > maxURL {
		return refuse(longURL, "The URL is longer than %d bytes.", maxURL)
	}
	headers := len(r.Host)
	for name, values := range r.Header {
		for _, value := range values {
			headers += len(name) + len(": \r\n") + len(value)
		}
	}
	if headers > maxHeaders {
		return refuse(longHeaders, "The headers are longer than %d bytes.", maxHeaders)
	}
	return nil
}

// handle runs the handler while the request holds its part of the tenant's memory.
func (s *server) handle(rt route, w *response, r *http.Request, c Caller) error {
	w.memory = &claim{of: s.memory, caller: c}
	defer w.memory.release() // also of a claim that was refused: it may be the first of its tenant
	if err := w.memory.reach(r.Context(), requestBytes); err != nil {
		return err
	}
	return rt.handle(w, r, c)
}

// ---- Answers

// response is the answer to one request. send is the only way to write it.
type response struct {
	rw      http.ResponseWriter
	route   string    // its pattern, which holds nothing that a client sent
	accepts string    // the request's Accept-Encoding
	memory  *claim    // what the request holds
	status  int       // 0: nothing was sent yet
	body    io.Writer // to the client, or to what compresses the answer for it
}

func (w *response) header() http.Header { return w.rw.Header() }

// A CSV has no place of its own to tell whether there are more rows.
const (
	typeCSV     = "text/csv; charset=utf-8"
	moreTrailer = "X-More"
)

var gzipAccepted = regexp.MustCompile(`(?i)(^|,)\s*gzip\s*(,|$|;\s*q=(1|0\.0*[1-9]))`)

// send writes a piece of the answer, for which the client gets a new writeTimeout: before the first
// one the header, with the last one the end. The answer is compressed if the client accepts that
// and the first piece is long enough.
func (w *response) send(status int, contentType string, piece []byte, last bool) error {
	if w.status == 0 {
		w.start(status, contentType, len(piece), last)
	}
	deadline := time.Now().Add(writeTimeout)
	if err := http.NewResponseController(w.rw).SetWriteDeadline(deadline); err != nil {
		return err
	}
	if _, err := w.body.Write(piece); err != nil {
		return err
	}
	if zip, zipped := w.body.(*gzip.Writer); zipped && last {
		return zip.Close()
	}
	return nil
}

// start writes the header.
func (w *response) start(status int, contentType string, length int, isAll bool) {
	w.status = status
	w.body = w.rw
	header := w.header()
	header.Set("Content-Type", contentType)
	header.Set("Vary", "Accept, Accept-Encoding")
	if contentType == typeCSV {
		header.Set("Trailer", moreTrailer)
	}
	if length > minGzip && gzipAccepted.MatchString(w.accepts) {
		header.Set("Content-Encoding", "gzip")
		w.body, _ = gzip.NewWriterLevel(w.rw, gzip.BestSpeed) // it fails on an unknown level only
	} else if isAll && contentType != typeCSV { // HTTP has trailers only where the length is open
		header.Set("Content-Length", strconv.Itoa(length))
	}
	w.rw.WriteHeader(status)
}

func (w *response) sendJSON(v any) error {
	return w.send(http.StatusOK, "application/json", []byte(asJSON(v)+"\n"), true)
}

// sendError tells the client what it may know of an error.
func (w *response) sendError(told errorAnswer) {
	switch told.status {
	case http.StatusUnauthorized:
		w.header().Set("WWW-Authenticate", "ApiKey")
	case http.StatusServiceUnavailable:
		w.header().Set("Retry-After", "1")
	}
	text := asJSON(map[string]string{"detail": told.detail}) + "\n"
	_ = w.send(told.status, "application/json", []byte(text), true) // fails if the client is gone
}

// ---- Bodies

// body is what a request sends, unpacked. It is decoded while it arrives: a slow client holds only
// what it has sent, as rows.
type body struct {
	in   io.Reader
	kind string // its media type
	size int64  // bytes read so far
	json *json.Decoder
	// digest is of all that was read.
	digest hash.Hash
}

// openBody returns the body, which is refused unless it is of one of types. Without a Content-Type
// it is of the first.
func openBody(w *response, r *http.Request, types ...string) (*body, error) {
	given := r.Header.Get("Content-Type")
	if given == "" {
		given = types[0]
	}
	kind, options, err := mime.ParseMediaType(given)
	charset := options["charset"]
	isUTF8 := charset == "" || strings.EqualFold(charset, "utf-8")
	if err != nil || !slices.Contains(types, kind) || !isUTF8 {
		return nil, refuse(unsupported, "Content-Type: expected %s in UTF-8.",
			strings.Join(types, " or "))
	}
	bytes := int64(bodyBytes)
	encoding := strings.ToLower(r.Header.Get("Content-Encoding"))
	isShort := r.ContentLength >= 0 && r.ContentLength < (bodyBytes-requestBytes)/8
	if encoding == "" && isShort {
		bytes = requestBytes + 8*r.ContentLength
	}
	if err := w.memory.reach(r.Context(), bytes); err != nil {
		return nil, err
	}
	b := &body{in: r.Body, kind: kind, digest: sha256.New()}
	switch encoding {
	case "", "identity":
	case "gzip":
		unpacked, err := gzip.NewReader(r.Body)
		if err != nil {
			return nil, inputError("body", err)
		}
		b.in = http.MaxBytesReader(w.rw, io.NopCloser(unpacked), maxBody)
	default:
		return nil, refuse(unsupported, "Content-Encoding: expected gzip or none.")
	}
	return b, nil
}

// errTooLong is the error of an element beyond maxElement.
var errTooLong = errors.New("too long")

// Read fills p as far as it can, because json.Decoder rescans white space on every Read. It refuses
// an element that json.Decoder would have to collect beyond maxElement.
func (b *body) Read(p []byte) (int, error) {
	if b.json != nil && b.size-b.json.InputOffset() > maxElement {
		return 0, errTooLong
	}
	n, err := io.ReadFull(b.in, p[:min(len(p), maxElement)])
	b.size += int64(n)
	b.digest.Write(p[:n])
	if n > 0 && err == io.ErrUnexpectedEOF {
		err = nil // the next Read tells whether it is the end
	}
	return n, err
}

// decodeJSON reads the body as one JSON object, as decodeObject does.
func (b *body) decodeJSON(members map[string]any) error {
	b.json = json.NewDecoder(b)
	err := decodeObject(b.json, members)
	if err == io.EOF && b.size == 0 {
		return invalid("body: expected a JSON object, and it is empty")
	}
	if err != nil {
		return inputError("body", err)
	}
	if _, err := b.json.Token(); err != io.EOF {
		if err == nil {
			return invalid("body: expected nothing after the object")
		}
		return inputError("body", err)
	}
	return nil
}

// decodeRequest decodes the body of a request that has no parameters in its query.
func (b *body) decodeRequest(r *http.Request, c Caller, members map[string]any) error {
	if err := b.decodeJSON(members); err != nil {
		return err
	}
	return readParameters(r).finish(c)
}

// decodeObject reads one JSON object. members says where its members go: pointers to decode into,
// or functions that read the member themselves. Unlike encoding/json alone it refuses a member
// that is given twice or in another case.
func decodeObject(dec *json.Decoder, members map[string]any) error {
	dec.DisallowUnknownFields()
	seen := map[string]bool{}
	return eachItem(dec, '{', func(int) error {
		token, err := dec.Token()
		if err != nil {
			return err
		}
		name := token.(string) // inside an object Token returns names here
		into, known := members[name]
		if !known {
			return unknownName("field", name, slices.Sorted(maps.Keys(members)))
		}
		if seen[name] {
			return invalid("%s: given twice", name)
		}
		seen[name] = true
		if read, ok := into.(func() error); ok {
			return inputError(name, read())
		}
		return inputError(name, dec.Decode(into))
	})
}

// eachItem reads an object or a list from its opening bracket to the closing one; item has to read
// each item.
func eachItem(dec *json.Decoder, opening json.Delim, item func(i int) error) error {
	token, err := dec.Token()
	if err != nil {
		return err
	}
	if token != opening {
		return fmt.Errorf("expected %s", opening)
	}
	for i := 0; dec.More(); i++ {
		if err := item(i); err != nil {
			return err
		}
	}
	_, err = dec.Token()
	return err
}

// unknownName refuses a name that is none of known, and suggests the nearest of those.
func unknownName(what, name string, known []string) error {
	if nearest := nearestName(name, known); nearest != "" {
		return invalid("%.100s: unknown %s; did you mean %s?", name, what, nearest)
	}
	return invalid("%.100s: unknown %s; there are %s", name, what, strings.Join(known, ", "))
}

// ---- Parameters

// parameters reads the query. It remembers which names were asked for, so that the others can be
// refused, and keeps the first error.
type parameters struct {
	values url.Values
	asked  []string
	err    error
}

func readParameters(r *http.Request) *parameters {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		err = invalid("the query string cannot be parsed")
	}
	return &parameters{values: values, err: err}
}

func (p *parameters) fail(err error) {
	if p.err == nil {
		p.err = err
	}
}

// each calls parse with each text of a parameter that may be repeated.
func (p *parameters) each(name string, parse func(text []byte) error) {
	p.asked = append(p.asked, name)
	for _, text := range p.values[name] {
		p.fail(inputError(name, parse([]byte(text))))
	}
}

// read parses a parameter that may be given once; if it is not given, into stays as it is.
func (p *parameters) read(name string, into encoding.TextUnmarshaler) {
	if len(p.values[name]) > 1 {
		p.asked = append(p.asked, name)
		p.fail(invalid("%s: given twice", name))
		return
	}
	p.each(name, into.UnmarshalText)
}

// series reads which series are named.
func (p *parameters) series() []seriesRef {
	refs := []seriesRef{}
	for _, id := range readEach[uuid](p, "series_id") {
		refs = append(refs, seriesRef{ID: id})
	}
	return append(refs, readEach[seriesRef](p, "series_key")...)
}

// patterns reads which series match.
func (p *parameters) patterns() []pattern {
	if len(p.values["match"]) > maxPatterns {
		p.fail(invalid("match: expected at most %d patterns", maxPatterns))
	}
	return readEach[pattern](p, "match")
}

// format reads whether rows are asked for as CSV.
func (p *parameters) format(r *http.Request) (csv bool) {
	format := label("json")
	if strings.Contains(r.Header.Get("Accept"), "text/csv") {
		format = "csv"
	}
	p.read("format", &format)
	if format != "json" && format != "csv" {
		p.fail(invalid("format: expected json or csv"))
	}
	return format == "csv"
}

// readEach reads a parameter that may be repeated.
func readEach[T any, P interface {
	*T
	encoding.TextUnmarshaler
}](p *parameters, name string) []T {
	var all []T
	p.each(name, func(text []byte) error {
		var one T
		err := P(&one).UnmarshalText(text)
		all = append(all, one)
		return err
	})
	return all
}

// window reads start_ and end_ of a time.
func (p *parameters) window(of string, start, end *timestamp) {
	p.read("start_"+of, (*bound)(start))
	p.read("end_"+of, (*bound)(end))
	if *end < *start {
		p.fail(invalid("end_%s: expected a time not before start_%s", of, of))
	}
}

// finish returns the first error. A parameter that nobody asked for is one: a misspelt filter must
// never widen an answer. So is a tenant_id that is not the caller's.
func (p *parameters) finish(c Caller) error {
	var tenant uuid
	p.read("tenant_id", &tenant)
	for _, name := range slices.Sorted(maps.Keys(p.values)) {
		if !slices.Contains(p.asked, name) {
			p.fail(unknownName("parameter", name, slices.Sorted(slices.Values(p.asked))))
			break
		}
	}
	p.fail(checkTenant(c, tenant))
	return p.err
}

// checkTenant refuses a tenant_id other than the caller's: no request acts for another tenant.
func checkTenant(c Caller, id uuid) error {
	if id == "" || string(id) == c.tenant {
		return nil
	}
	return refuse(forbidden, "tenant_id is not the tenant of this API key.")
}

// ---- Handlers

// pagePolicy lets the page run its own scripts, ask this server, and nothing else. Nothing inline
// runs, so a name of a series that should ever become HTML stays dead.
const pagePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; " +
	"img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// pageFiles are what the page consists of beside its HTML. No other route answers JavaScript, so
// nothing that is stored can be loaded as a script.
var pageFiles = map[string]string{
	"docs.css":     "text/css; charset=utf-8",
	"api.js":       typeScript,
	"explore.js":   typeScript,
	"lead.js":      typeScript,
	"moments.js":   typeScript,
	"picture.js":   typeScript,
	"plot.js":      typeScript,
	"reference.js": typeScript,
	"tabs.js":      typeScript,
	"times.js":     typeScript,
	"writes.js":    typeScript,
}

const typeScript = "text/javascript; charset=utf-8"

func sendPageFile(w *response, r *http.Request, c Caller) error {
	name := path.Base(r.URL.Path)
	return sendFile(name, pageFiles[name])(w, r, c)
}

// sendFile sends a file of web/.
func sendFile(name, contentType string) func(*response, *http.Request, Caller) error {
	text, err := web.ReadFile("web/" + name)
	return func(w *response, _ *http.Request, _ Caller) error {
		if err != nil {
			return err
		}
		w.header().Set("Content-Security-Policy", pagePolicy)
		w.header().Set("Referrer-Policy", "no-referrer")
		w.header().Set("Cross-Origin-Opener-Policy", "same-origin")
		w.accepts = "" // what compresses an answer takes a megabyte, and nobody knows who asks
		return w.send(http.StatusOK, contentType, text, true)
	}
}

func (s *server) getHealth(w *response, r *http.Request, _ Caller) error {
	ctx, cancel := context.WithTimeout(r.Context(), healthTimeout)
	defer cancel()
	if _, err := s.health.UsersTableExists(ctx); err != nil {
		return err
	}
	return w.sendJSON(map[string]string{"status": "ok"})
}

func (s *server) postSeries(w *response, r *http.Request, c Caller) error {
	var name seriesRef
	var description *prose
	unit := label(defaultUnit)
	b, err := openBody(w, r, "application/json")
	if err != nil {
		return err
	}
	members := map[string]any{"name": &name, "description": &description, "unit": &unit}
	if err := b.decodeRequest(r, c, members); err != nil {
		return err
	}
	if name.Key == "" {
		return invalid("name is required")
	}
	id, created, err := s.store.CreateSeries(r.Context(), c, name, unit, description)
	if err != nil {
		return err
	}
	message := "Series already exists"
	if created {
		message = "Series created successfully"
	}
	return w.sendJSON(map[string]string{"series_id": id, "message": message})
}

func (s *server) getSeries(w *response, r *http.Request, c Caller) error {
	if err := refuseOldProtocol(r); err != nil {
		return err
	}
	var stats boolean
	p := readParameters(r)
	match := p.patterns()
	p.read("stats", &stats)
	if err := p.finish(c); err != nil {
		return err
	}
	out := stream{w: w, contentType: "application/json", buf: []byte("{")}
	emit := func(id string, shown []byte) error {
		out.buf = fmt.Appendf(out.buf, `%q:%s,`, id, shown)
		return out.flushIfFull()
	}
	err := s.store.ListSeries(r.Context(), c, match, bool(stats), emit)
	if err != nil {
		return err
	}
	return out.finish("}\n")
}

func (s *server) getRuns(w *response, r *http.Request, c Caller) error {
	if err := refuseOldProtocol(r); err != nil {
		return err
	}
	q := runsQuery{startKnown: firstTime, endKnown: lastTime, limit: 1000}
	p := readParameters(r)
	p.read("workflow_id", &q.workflow)
	p.read("series_key", &q.series)
	p.window("known", &q.startKnown, &q.endKnown)
	p.read("limit", &q.limit)
	if q.limit > maxRuns {
		p.fail(invalid("limit: expected at most %d", maxRuns))
	}
	if err := p.finish(c); err != nil {
		return err
	}
	out := stream{w: w, contentType: "application/json", buf: []byte(`{"data":[`)}
	n := count(0)
	more := false
	err := s.store.ListRuns(r.Context(), c, q, func(shown []byte) error {
		if n == q.limit {
			more = true
			return nil
		}
		n++
		out.buf = append(out.buf, shown...)
		out.buf = append(out.buf, ',')
		return out.flushIfFull()
	})
	if err != nil {
		return err
	}
	return out.finish(fmt.Sprintf("],\"count\":%d,\"more\":%t}\n", n, more))
}

// postWithdrawal takes a body or none.
func (s *server) postWithdrawal(w *response, r *http.Request, c Caller) error {
	var run uuid
	var annotation prose
	name := strings.TrimSuffix(strings.TrimPrefix(r.URL.Path, "/runs/"), "/withdraw")
	if err := run.UnmarshalText([]byte(name)); err != nil {
		return inputError("run_id", err)
	}
	if r.ContentLength == 0 {
		r.Body = io.NopCloser(strings.NewReader("{}"))
		r.Header.Del("Content-Type") // curl says that nothing is a form
	}
	b, err := openBody(w, r, "application/json")
	if err != nil {
		return err
	}
	members := map[string]any{"annotation": &annotation}
	if err := b.decodeRequest(r, c, members); err != nil {
		return err
	}
	shown, err := s.store.Withdraw(r.Context(), c, run, annotation)
	if err != nil {
		return err
	}
	return w.sendJSON(shown)
}

// uploadRow is one of value_rows. encoding/json reads it as it is: it folds the case of names, and
// of a name that is given twice the last counts. Names checked here would halve the speed.
type uploadRow struct {
	ValidTime    timestamp `json:"valid_time"`
	ValidTimeEnd timestamp `json:"valid_time_end"`
	SeriesID     uuid      `json:"series_id"`
	ValueKey     seriesRef `json:"value_key"`
	SeriesKey    seriesRef `json:"series_key"` // the same by the name that it has in answers
	Value        number    `json:"value"`
}

// uploadReader reads an upload row by row.
type uploadReader struct {
	upload
	row      uploadRow // the one that is being read
	keyBytes int       // the length of the keys of all series together
	ctx      context.Context
	memory   *claim
}

// addRow checks the row that was read, which has this number, and adds it to the upload.
func (u *uploadReader) addRow(number int) error {
	row := &u.row
	ref := row.ValueKey
	switch {
	case ref.Key == "":
		ref = row.SeriesKey
	case row.SeriesKey.Key != "" && row.SeriesKey.Key != ref.Key:
		return invalid("series_key: expected the same as value_key, or one of both")
	}
	ref.ID = row.SeriesID
	if row.Value == notGiven {
		return invalid("value is required (a number or null)")
	}
	if err := checkTimes(row.ValidTime, row.ValidTimeEnd); err != nil {
		return err
	}
	if ref == (seriesRef{}) {
		return invalid("value_key or series_id is required")
	}
	rows := u.series[ref]
	if rows == nil {
		rows = &seriesRows{}
		u.series[ref] = rows
		u.keyBytes += len(ref.Key) + len(ref.Given)
	}
	rows.points = append(rows.points,
		point{row.ValidTime, row.ValidTimeEnd, float64(row.Value)})
	// #nosec G115 -- a body has fewer lines than it has bytes
	rows.numbers = append(rows.numbers, int32(number))
	u.rows++
	if len(u.series) > maxSeries {
		return invalid("series: expected at most %d in one upload", maxSeries)
	}
	if u.rows > maxRows {
		return invalid("value: expected at most %d rows in one upload", maxRows)
	}
	held := u.rows*rowBytes + len(u.series)*newSeriesBytes + u.keyBytes*keyCopies
	return u.memory.reach(u.ctx, bodyBytes+int64(held))
}

// checkTimes checks the times of a value. An end of 0 is none.
func checkTimes(begin, end timestamp) error {
	if begin == 0 {
		return invalid("valid_time is required")
	}
	if end != 0 && end <= begin {
		return invalid("valid_time_end: expected a time after valid_time")
	}
	return nil
}

func (s *server) postUpload(w *response, r *http.Request, c Caller) error {
	b, err := openBody(w, r, "application/json", "text/csv")
	if err != nil {
		return err
	}
	u := &uploadReader{ctx: r.Context(), memory: w.memory}
	u.workflowID = "api-workflow"
	u.createSeries = true
	u.series = map[seriesRef]*seriesRows{}
	if b.kind == "text/csv" {
		err = u.readCSV(b, readParameters(r), c)
	} else {
		err = u.readJSON(b, readParameters(r), c)
	}
	if err != nil {
		return err
	}
	if err := u.check(); err != nil {
		return err
	}
	w.memory.settle()
	fmt.Fprintf(b.digest, "%s?%s", b.kind, r.URL.Query().Encode())
	u.digest = b.digest.Sum(nil)
	ids, err := s.store.Upload(r.Context(), c, &u.upload)
	if err != nil {
		return err
	}
	return w.sendJSON(map[string]any{
		"run_id":        u.runID,
		"message":       "Run created successfully",
		"series_ids":    ids,
		"rows_inserted": u.rows,
	})
}

// field is a name and where its value goes.
type field struct {
	name string
	into encoding.TextUnmarshaler
}

// fields are those of the run itself. A JSON object has them as members, a CSV in the query.
func (u *uploadReader) fields() []field {
	return []field{
		{"run_id", &u.runID},
		{"workflow_id", &u.workflowID},
		{"run_start_time", &u.start},
		{"run_finish_time", &u.finish},
		{"known_time", &u.known},
		{"run_params", &u.params},
		{"series_descriptions", &u.descriptions},
	}
}

func (u *uploadReader) readJSON(b *body, p *parameters, c Caller) error {
	var tenant uuid
	members := map[string]any{
		"tenant_id":     &tenant,
		"create_series": &u.createSeries,
		"value_rows":    func() error { return u.readRows(b.json) },
	}
	for _, f := range u.fields() {
		members[f.name] = f.into
	}
	if err := b.decodeJSON(members); err != nil {
		return err
	}
	if err := p.finish(c); err != nil {
		return err
	}
	return checkTenant(c, tenant)
}

// readRows reads a list of rows.
func (u *uploadReader) readRows(dec *json.Decoder) error {
	u.list = "value_rows"
	return eachItem(dec, '[', func(i int) error {
		u.row = uploadRow{Value: notGiven}
		err := dec.Decode(&u.row)
		if err == nil {
			err = u.addRow(i)
		}
		return u.refuseRow(i, err)
	})
}

// refuseRow says which row is wrong, and of which series it is, if that was read already.
func (u *uploadReader) refuseRow(i int, err error) error {
	if err == nil {
		return nil
	}
	err = refuseElement(u.list, i, err)
	key := cmp.Or(u.row.ValueKey.Key, u.row.SeriesKey.Key)
	var refused *refusal
	if key == "" || !errors.As(err, &refused) || refused.kind != invalidInput {
		return err
	}
	message := fmt.Sprintf("%s; the series is %q", refused.message, key)
	return &refusal{invalidInput, message, refused.reason}
}

// check checks what is not a row.
func (u *uploadReader) check() error {
	start := cmp.Or(u.start, u.known)
	if start == 0 {
		start = timestampOf(time.Now())
	}
	if u.finish != 0 && u.finish < start {
		return invalid("run_finish_time: expected a time not before run_start_time, which is " +
			"known_time, or else now, if it is left out")
	}
	unused := maps.Clone(u.descriptions)
	for ref := range u.series {
		delete(unused, ref.Key)
	}
	for _, key := range slices.Sorted(maps.Keys(unused)) {
		return invalid("series_descriptions: no row has the value_key %q", key)
	}
	return nil
}

// readCSV takes the run's fields from the query, and rows under a header line, in which the columns
// may have any order.
func (u *uploadReader) readCSV(in io.Reader, p *parameters, c Caller) error {
	for _, f := range u.fields() {
		p.read(f.name, f.into)
	}
	p.read("create_series", (*boolean)(&u.createSeries))
	if err := p.finish(c); err != nil {
		return err
	}
	u.list = "line"
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxLine+1)
	var columns []field
	var cells [][]byte
	n := 1
	for ; lines.Scan(); n++ {
		line := lines.Bytes()
		u.row = uploadRow{Value: notGiven} // or a refusal would name the series of the row before
		if n == 1 {
			line = bytes.TrimPrefix(line, []byte("\ufeff")) // by which Excel marks UTF-8
		}
		var err error
		cells, err = appendCells(cells[:0], line)
		switch {
		case err != nil:
		case n == 1:
			columns, err = u.columns(cells)
		case len(line) > 0:
			err = u.addCells(n, columns, cells)
		}
		// Of a line that was cut short the scanner's error, below, is the cause.
		if err != nil && lines.Err() == nil {
			return u.refuseRow(n, err)
		}
	}
	if lines.Err() == nil && n == 1 {
		return invalid("header: expected valid_time,value_key,value, and the body is empty")
	}
	return inputError(fmt.Sprintf("line[%d]", n), lines.Err())
}

// columns returns where the cells under a header go.
func (u *uploadReader) columns(header [][]byte) ([]field, error) {
	into := map[string]encoding.TextUnmarshaler{
		"valid_time":     &u.row.ValidTime,
		"value_key":      &u.row.ValueKey,
		"series_key":     &u.row.SeriesKey,
		"value":          &u.row.Value,
		"valid_time_end": &u.row.ValidTimeEnd,
		"series_id":      &u.row.SeriesID,
	}
	var columns []field
	var unknown []string
	given := map[string]bool{}
	for _, cell := range header {
		name := string(cell)
		switch {
		case name == "":
			return nil, invalid("header: a column has no name; in pandas, to_csv(index=False) " +
				"leaves the index out")
		case strings.ContainsAny(name, ";\t"):
			return nil, invalid("header: expected commas between columns, not semicolons or tabs")
		case given[name]:
			return nil, invalid("header: %s: given twice", name)
		case into[name] == nil:
			unknown = append(unknown, name)
		}
		given[name] = true
		columns = append(columns, field{name, into[name]})
	}
	if len(unknown) > 0 {
		return nil, unknownName("in the header, to be dropped or renamed",
			strings.Join(unknown, ", "), slices.Sorted(maps.Keys(into)))
	}
	hasSeries := given["value_key"] || given["series_key"] || given["series_id"]
	if !given["valid_time"] || !given["value"] || !hasSeries {
		return nil, invalid("header: expected valid_time, value, and value_key, series_key or " +
			"series_id")
	}
	return columns, nil
}

// addCells reads the cells of one line as a row. An empty value is NULL; another empty cell is not
// given.
func (u *uploadReader) addCells(number int, columns []field, cells [][]byte) error {
	if len(cells) != len(columns) {
		return fmt.Errorf("expected %d cells, as in the header", len(columns))
	}
	for i, cell := range cells {
		column := columns[i]
		if len(cell) == 0 && column.into != &u.row.Value {
			continue
		}
		if err := column.into.UnmarshalText(cell); err != nil {
			return inputError(column.name, err)
		}
	}
	return u.addRow(number)
}

// appendCells appends the cells of a line of CSV. Quotes, which are rare, are left to encoding/csv.
func appendCells(cells [][]byte, line []byte) ([][]byte, error) {
	if !bytes.ContainsRune(line, '"') {
		return slices.AppendSeq(cells, bytes.SplitSeq(line, []byte{','})), nil
	}
	record, err := csv.NewReader(bytes.NewReader(line)).Read()
	if err != nil {
		return nil, errors.Unwrap(err) // without the number of the line, which is always 1
	}
	for _, text := range record {
		cells = append(cells, []byte(text))
	}
	return cells, nil
}

// readUpdate reads one of updates. A null of a member that nothing can clear is as good as none.
func readUpdate(dec *json.Decoder, c Caller) (correction, error) {
	var x correction
	var tenant uuid
	err := decodeObject(dec, map[string]any{
		"valid_time":     &x.point.time,
		"valid_time_end": &x.point.end,
		"known_time":     &x.of.known,
		"run_id":         &x.of.id,
		"tenant_id":      &tenant,
		"series_id":      &x.ref.ID,
		"series_key":     &x.ref,
		"value":          &x.value,
		"annotation":     &x.annotation,
		"tags":           &x.tags,
	})
	if err != nil {
		return x, err
	}
	if x.tags.value != nil {
		tags := *x.tags.value
		if len(tags) > maxTags || slices.Contains(tags, "") { // "": a null among them
			return x, invalid("tags: expected at most %d texts", maxTags)
		}
	}
	if !x.value.given && !x.annotation.given && !x.tags.given {
		return x, invalid("value, annotation or tags is required")
	}
	if err := checkTimes(x.point.time, x.point.end); err != nil {
		return x, err
	}
	if x.ref == (seriesRef{}) {
		return x, invalid("series_key or series_id is required")
	}
	return x, checkTenant(c, tenant)
}

func (s *server) putValues(w *response, r *http.Request, c Caller) error {
	b, err := openBody(w, r, "application/json")
	if err != nil {
		return err
	}
	var corrections []correction
	readUpdates := func() error {
		return eachItem(b.json, '[', func(i int) error {
			if i == maxUpdates {
				return fmt.Errorf("expected at most %d updates", maxUpdates)
			}
			x, err := readUpdate(b.json, c)
			if err != nil {
				return refuseElement("updates", i, err)
			}
			corrections = append(corrections, x)
			return w.memory.reach(r.Context(), bodyBytes+b.size+int64(i*updateBytes))
		})
	}
	members := map[string]any{"updates": readUpdates}
	if err := b.decodeRequest(r, c, members); err != nil {
		return err
	}
	w.memory.settle()
	updated, unchanged, err := s.store.Correct(r.Context(), c, corrections, w.memory)
	if err != nil {
		return err
	}
	return w.sendJSON(map[string]any{"updated": updated, "skipped_no_ops": unchanged})
}

// readRequest is a read of values, and how it is to be answered.
type readRequest struct {
	readQuery
	detail, csv bool
	limit       count // 0: none
}

func parseRead(r *http.Request, c Caller) (readRequest, error) {
	q := readRequest{readQuery: anyValue}
	mode := label("flat")
	p := readParameters(r)
	q.series = p.series()
	q.csv = p.format(r)
	q.match = p.patterns()
	q.runs = readEach[uuid](p, "run_id")
	q.workflows = readEach[label](p, "workflow_id")
	p.window("valid", &q.start, &q.end)
	p.window("known", &q.startKnown, &q.endKnown)
	p.read("mode", &mode)
	p.read("all_versions", (*boolean)(&q.allVersions))
	p.read("as_of", (*bound)(&q.asOf))
	p.read("changed_since", (*bound)(&q.changedSince))
	p.read("latest", (*boolean)(&q.latest))
	p.read("lead", &q.lead)
	p.read("days_ahead", &q.daysAhead)
	p.read("time_of_day", &q.timeOfDay)
	p.read("tz", &q.zone)
	p.read("bucket", &q.bucket)
	p.each("agg", q.aggs.UnmarshalText)
	p.read("detail", (*boolean)(&q.detail))
	p.read("limit", &q.limit)
	if mode != "flat" && mode != "overlapping" {
		p.fail(invalid("mode: expected flat or overlapping"))
	}
	q.overlapping = mode == "overlapping"
	q.detail = q.detail || q.allVersions
	p.fail(q.check())
	return q, p.finish(c)
}

// check checks what parameters mean together.
func (q *readRequest) check() error {
	aggregated := q.bucket != width{}
	if aggregated != (len(q.aggs) > 0) {
		return invalid("bucket and agg: expected both or none")
	}
	if aggregated && (q.overlapping || q.detail) {
		return invalid("bucket: aggregates only what mode=flat shows, without detail or " +
			"all_versions")
	}
	gated := q.daysAhead >= 0
	if gated != (q.timeOfDay >= 0) {
		return invalid("days_ahead and time_of_day: expected both or none")
	}
	if gated && q.lead >= 0 {
		return invalid("lead: expected not beside days_ahead, which bounds known_time too")
	}
	if q.latest && (aggregated || q.overlapping || q.allVersions) {
		return invalid("latest: expected mode=flat, without bucket or all_versions")
	}
	return nil
}

// errEnough ends a read that has more rows than its limit.
var errEnough = errors.New("limit reached")

// refuseOldProtocol refuses what an answer that streams cannot be sent by.
func refuseOldProtocol(r *http.Request) error {
	if r.ProtoAtLeast(1, 1) {
		return nil
	}
	return refuse(oldProtocol,
		"HTTP/1.0 cannot tell a broken answer from a complete one: use HTTP/1.1.")
}

func (s *server) getValues(w *response, r *http.Request, c Caller) error {
	if err := refuseOldProtocol(r); err != nil {
		return err
	}
	q, err := parseRead(r, c)
	if err != nil {
		return err
	}
	out := newValueWriter(w, q)
	err = s.store.Read(r.Context(), c, q.readQuery, w.memory, func(e *element) error {
		if q.limit > 0 && out.count == int64(q.limit) {
			return errEnough
		}
		return out.row(e)
	})
	if err != nil && err != errEnough {
		return err
	}
	return out.finish(err == errEnough)
}

// correctionsRequest is a list of corrections, and how it is to be answered.
type correctionsRequest struct {
	correctionsQuery
	limit count
	csv   bool
}

func parseCorrections(r *http.Request, c Caller) (correctionsRequest, error) {
	q := correctionsRequest{limit: 1000}
	q.since = firstTime
	q.until = lastTime
	q.start = firstTime
	q.end = lastTime
	p := readParameters(r)
	q.series = p.series()
	q.match = p.patterns()
	p.read("since", (*bound)(&q.since))
	p.read("until", (*bound)(&q.until))
	p.window("valid", &q.start, &q.end)
	p.read("changed_by", &q.changedBy)
	p.read("tag", &q.tag)
	p.read("limit", &q.limit)
	q.csv = p.format(r)
	if q.until < q.since {
		p.fail(invalid("until: expected a time not before since"))
	}
	if q.limit > maxCorrections {
		p.fail(invalid("limit: expected at most %d", maxCorrections))
	}
	return q, p.finish(c)
}

// getCorrections ends its answer between two change_times only, so that until pages.
func (s *server) getCorrections(w *response, r *http.Request, c Caller) error {
	if err := refuseOldProtocol(r); err != nil {
		return err
	}
	q, err := parseCorrections(r, c)
	if err != nil {
		return err
	}
	out := newRowWriter(w, q.csv, "change_time", "changed_by", "series_id", "series_key",
		"series_unit", "valid_time", "valid_time_end", "run_id", "known_time", "version",
		"old_value", "value", "annotation", "tags")
	last := timestamp(0)
	more := false
	err = s.store.ListCorrections(r.Context(), c, q.correctionsQuery,
		func(e *element, old float64) error {
			more = out.count >= int64(q.limit) && e.from.Change != last
			if more {
				return errEnough
			}
			last = e.from.Change
			return out.correction(e, old)
		})
	if err != nil && err != errEnough {
		return err
	}
	return out.finish(more)
}

// ---- Rows

// stream sends an answer in pieces of flushBytes. What fails before the first is full was not sent
// yet, and gets a proper status.
type stream struct {
	w           *response
	contentType string
	buf         []byte
}

// flushIfFull sends what is full but for its last byte, which finish may have to take away.
func (s *stream) flushIfFull() error {
	if len(s.buf) < flushBytes {
		return nil
	}
	last := len(s.buf) - 1
	err := s.w.send(http.StatusOK, s.contentType, s.buf[:last], false)
	s.buf = append(s.buf[:0], s.buf[last])
	return err
}

// finish takes the comma away that follows the last item, and sends the rest.
func (s *stream) finish(ending string) error {
	s.buf = append(bytes.TrimSuffix(s.buf, []byte(",")), ending...)
	return s.w.send(http.StatusOK, s.contentType, s.buf, true)
}

// rowWriter streams rows as {"data":[…],"count":n,"more":false} or as CSV. Each row is made of one
// cell for each column, in their order.
type rowWriter struct {
	stream
	csv         bool
	quote, null string   // around a time; for NULL
	before      []string // each cell: in JSON its name
	column      int      // of the next cell
	count       int64
}

func newRowWriter(w *response, csv bool, columns ...string) rowWriter {
	o := rowWriter{csv: csv}
	o.w = w
	o.buf = make([]byte, 0, smallBytes)
	if csv {
		o.contentType = typeCSV
		o.buf = append(o.buf, strings.Join(columns, ",")+"\n"...)
		o.before = append([]string{""}, slices.Repeat([]string{","}, len(columns)-1)...)
		return o
	}
	o.contentType = "application/json"
	o.buf = append(o.buf, `{"data":[`...)
	o.quote = `"`
	o.null = "null"
	separator := "{"
	for _, name := range columns {
		o.before = append(o.before, separator+`"`+name+`":`)
		separator = ","
	}
	return o
}

// next begins the next cell.
func (o *rowWriter) next() {
	o.buf = append(o.buf, o.before[o.column]...)
	o.column++
}

// cell writes what is in its final form already.
func (o *rowWriter) cell(written []byte) {
	o.next()
	o.buf = append(o.buf, written...)
}

func (o *rowWriter) number(f float64) {
	o.next()
	o.buf = appendNumber(o.buf, f, o.null)
}

// time writes a time. One that timedb or the clock of a run made always has six digits of fraction,
// so that a column of these has one shape.
func (o *rowWriter) time(t timestamp, sixDigits bool) {
	o.next()
	if t == 0 {
		o.buf = append(o.buf, o.null...)
		return
	}
	o.buf = append(o.buf, o.quote...)
	o.buf = t.append(o.buf, sixDigits)
	o.buf = append(o.buf, o.quote...)
}

// text writes a text; nil is NULL.
func (o *rowWriter) text(text *string) { o.cell(o.written(text)) }

// written is a text in the form of a cell.
func (o *rowWriter) written(text *string) []byte {
	switch {
	case text == nil:
		return []byte(o.null)
	case o.csv:
		return []byte(`"` + strings.ReplaceAll(*text, `"`, `""`) + `"`)
	}
	return []byte(asJSON(*text))
}

// texts writes a list of texts, which is JSON in a CSV too.
func (o *rowWriter) texts(list []string) {
	text := asJSON(list)
	switch {
	case list == nil:
		o.text(nil)
	case o.csv:
		o.text(&text)
	default:
		o.cell([]byte(text))
	}
}

// endRow ends a row.
func (o *rowWriter) endRow() error {
	o.count++
	o.column = 0
	if o.csv {
		o.buf = append(o.buf, '\n')
	} else {
		o.buf = append(o.buf, "},"...)
	}
	return o.flushIfFull()
}

// finish sends the rest, with what tells a complete answer, and whether there are more rows.
func (o *rowWriter) finish(more bool) error {
	if !o.csv {
		return o.stream.finish(fmt.Sprintf("],\"count\":%d,\"more\":%t}\n", o.count, more))
	}
	if err := o.stream.finish(""); err != nil {
		return err
	}
	o.w.header().Set(moreTrailer, strconv.FormatBool(more))
	return nil
}

// valueWriter writes the rows of a read.
type valueWriter struct {
	rowWriter
	overlapping, detail bool
	of                  *series // of the last row
	id, names           []byte  // what all its rows share: one cell, and those of key and unit
	unitColumn          int
}

func newValueWriter(w *response, q readRequest) *valueWriter {
	values := []string{"value"}
	if len(q.aggs) > 1 {
		values = q.aggs
	}
	columns := slices.Concat([]string{"valid_time", "series_id"}, values,
		[]string{"series_key", "series_unit"})
	const known, end = "known_time", "valid_time_end"
	if q.overlapping {
		columns = slices.Insert(columns, 0, known)
	}
	if q.detail {
		columns = append(columns, "run_id")
	}
	if q.detail && !q.overlapping {
		columns = append(columns, known)
	}
	columns = append(columns, end)
	if q.detail {
		columns = append(columns, "change_time", "changed_by", "annotation", "tags", "version")
	}
	return &valueWriter{
		rowWriter:   newRowWriter(w, q.csv, columns...),
		overlapping: q.overlapping,
		detail:      q.detail,
		unitColumn:  slices.Index(columns, "series_unit"),
	}
}

func (o *valueWriter) row(e *element) error {
	if x := e.from.of; x != o.of {
		o.of = x
		o.id = []byte(o.quote + x.ID + o.quote)
		between := []byte(o.before[o.unitColumn])
		o.names = slices.Concat(o.written(&x.Key), between, o.written(&x.Unit))
	}
	if o.overlapping {
		o.time(e.from.Known, true)
	}
	o.time(e.time, false)
	o.cell(o.id)
	for _, f := range e.from.aggregates {
		o.number(f)
	}
	if len(e.from.aggregates) == 0 {
		o.number(e.value)
	}
	o.cell(o.names)
	o.column++ // that of the unit
	if !o.detail {
		if e.end != 0 || o.csv { // rows of a CSV cannot differ
			o.time(e.end, false)
		}
		return o.endRow()
	}
	o.text(&e.from.RunID)
	if !o.overlapping {
		o.time(e.from.Known, true)
	}
	o.time(e.end, false)
	o.time(e.from.Change, true)
	o.text(e.from.ChangedBy)
	o.text(e.from.Annotation)
	o.texts(e.from.Tags)
	o.cell([]byte(strconv.Itoa(e.from.Number)))
	return o.endRow()
}

// correction writes a correction, with the value before it.
func (o *rowWriter) correction(e *element, old float64) error {
	o.time(e.from.Change, true)
	o.text(e.from.ChangedBy)
	o.text(&e.from.of.ID)
	o.text(&e.from.of.Key)
	o.text(&e.from.of.Unit)
	o.time(e.time, false)
	o.time(e.end, false)
	o.text(&e.from.RunID)
	o.time(e.from.Known, true)
	o.cell([]byte(strconv.Itoa(e.from.Number)))
	o.number(old)
	o.number(e.value)
	o.text(e.from.Annotation)
	o.texts(e.from.Tags)
	return o.endRow()
}
