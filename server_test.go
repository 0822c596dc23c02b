package main

// The tests drive timedb as its users do, through the command line's run and through HTTP, on a real PostgreSQL; SQL is
// used to look at what was stored and to break things. Each test has a database of its own, and the API runs under a role
// that has no more than `create tables --app-role` grants.
//
// The tests of each source file stand beside it: cli_test.go (command line), auth_test.go (keys, tenancy, what can be
// read off the source), store_test.go (what is stored and shown, against a naive model), faults_test.go (what timedb runs
// on breaks; script/faults runs these for longer). This file has the harness first, then HTTP: routes, limits, uploads,
// reads, openapi.json.

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/base64"
	"encoding/csv"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/lib/pq"
)

const (
	tenantA = "aaaaaaaa-0000-4000-8000-00000000000a"
	tenantB = "bbbbbbbb-0000-4000-8000-00000000000b"
	nobody  = "99999999-9999-4999-8999-999999999999" // an id that never existed
)

var faults = flag.Int("faults", 1, "how many times as long each TestFault runs; script/faults has it run 20 times as long")
var histories = flag.Int("histories", 2000, "how many random histories TestReadsAgreeWithNaiveModel checks")

// appRole is the role that the API runs under, one for the whole process; a role belongs to the cluster.
var appRole struct {
	once           sync.Once
	name, password string
}

func TestMain(m *testing.M) {
	if os.Getenv("TEST_RUNS_THE_PROGRAM") != "" {
		main()
	}
	m.Run() // its code becomes the exit code when TestMain returns
	if appRole.name != "" {
		if db, err := sql.Open("postgres", databaseURL("", nil)); err == nil {
			_, err = db.Exec("DROP ROLE IF EXISTS " + appRole.name)
			if err != nil {
				fmt.Fprintln(os.Stderr, "the test role is left over:", err)
			}
			db.Close()
		}
	}
}

// databaseURL is TEST_DATABASE_URL with another database and another user, unless these are empty.
func databaseURL(database string, who *url.Userinfo) string {
	u, err := url.Parse(os.Getenv("TEST_DATABASE_URL"))
	if err != nil {
		return ""
	}
	if database != "" {
		u.Path = "/" + database
	}
	if who != nil {
		u.User = who
	}
	q := u.Query()
	if !q.Has("sslmode") {
		q.Set("sslmode", "disable") // lib/pq, used bare here, would require TLS
	}
	u.RawQuery = q.Encode()
	return u.String()
}

// mustDatabase creates an empty database for this test and returns its URL, as its owner.
func mustDatabase(t testing.TB) string {
	t.Helper()
	if os.Getenv("TEST_DATABASE_URL") == "" {
		t.Fatal("TEST_DATABASE_URL is not set: run script/test, which starts a private PostgreSQL and sets it")
	}
	admin := mustOpen(t, databaseURL("", nil))
	name := fmt.Sprintf("timedb_test_%016x", rand.Uint64())
	mustExec(t, admin, "CREATE DATABASE "+name)
	t.Cleanup(func() {
		if found := secretsIn(t, databaseURL(name, nil)); found != "" { // S6
			t.Errorf("a dump of the database holds %s", found)
		}
		mustExec(t, admin, "DROP DATABASE "+name+" WITH (FORCE)")
	})
	mustExec(t, admin, "ALTER DATABASE "+name+" SET synchronous_commit = off") // nobody needs this data tomorrow
	appRole.once.Do(func() {
		appRole.name = fmt.Sprintf("timedb_test_app_%016x", rand.Uint64())
		appRole.password = fmt.Sprintf("app-password-%x", rand.Uint64())
		mustExec(t, admin, "CREATE ROLE "+appRole.name+" LOGIN PASSWORD '"+appRole.password+"'")
	})
	return databaseURL(name, nil)
}

// secretsIn looks for whole keys and for passwords in a dump of the database, and says what it found.
func secretsIn(t testing.TB, dsn string) string {
	t.Helper()
	dump, err := exec.Command("pg_dump", dsn).Output()
	if failed, ok := errors.AsType[*exec.ExitError](err); ok && bytes.Contains(failed.Stderr, []byte("does not exist")) {
		return "" // the test has dropped what it made
	}
	if err != nil {
		t.Fatalf("pg_dump (of Debian's package postgresql): %v", err)
	}
	password, _ := mustParse(t, dsn).User.Password()
	return secretsOf(string(dump), password)
}

// secretsOf says whether text holds a whole key, the password or that of the API's role.
func secretsOf(text, password string) string {
	switch {
	case wholeKey.MatchString(text):
		return "a key"
	case appRole.password != "" && strings.Contains(text, appRole.password) || password != "" && strings.Contains(text, password):
		return "a password"
	}
	return ""
}

func mustParse(t testing.TB, text string) *url.URL {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal("a URL cannot be parsed")
	}
	return u
}

// asAppRole is the same database as the API's role.
func asAppRole(dsn string) string {
	u, _ := url.Parse(dsn)
	return databaseURL(strings.TrimPrefix(u.Path, "/"), url.UserPassword(appRole.name, appRole.password))
}

func mustOpen(t testing.TB, dsn string) *sql.DB {
	t.Helper()
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		t.Fatal("the database's URL cannot be opened")
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func mustExec(t testing.TB, db *sql.DB, query string, args ...any) {
	t.Helper()
	if _, err := db.Exec(query, args...); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}

// mustQuery returns the one value that query selects, as text; NULL and no row are "".
func mustQuery(t testing.TB, db *sql.DB, query string, args ...any) string {
	t.Helper()
	var text sql.NullString
	if err := db.QueryRow(query, args...).Scan(&text); err != nil && err != sql.ErrNoRows {
		t.Fatalf("%s: %v", query, err)
	}
	return text.String
}

// runIn is one command line with its environment and its input.
func runIn(env map[string]string, stdin string, args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = run(context.Background(), args, func(name string) string { return env[name] }, strings.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

// mustRun runs a command line on dsn, which must end with want, and returns what it printed.
func mustRun(t testing.TB, want int, dsn, stdin string, args ...string) (stdout, stderr string) {
	t.Helper()
	code, stdout, stderr := runIn(map[string]string{"TIMEDB_DSN": dsn}, stdin, args...)
	if code != want {
		t.Fatalf("timedb %s: exit %d, want %d\nstdout: %s\nstderr: %s", strings.Join(args, " "), code, want, stdout, stderr)
	}
	if code != 0 && !strings.Contains(stderr, "ERROR: ") {
		t.Fatalf("timedb %s: exit %d without ERROR: on stderr: %q", strings.Join(args, " "), code, stderr)
	}
	return stdout, stderr
}

// mustCreateTables makes the tables, with users, and grants the API's role its part.
func mustCreateTables(t testing.TB, dsn string, more ...string) {
	t.Helper()
	mustRun(t, 0, dsn, "", append([]string{"create", "tables", "-y", "--app-role", appRole.name}, more...)...)
}

// logBuffer is what a server writes to stdout or stderr, readable at any time.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// testServer is a running `timedb api` and the database under it.
type testServer struct {
	url, dsn string
	db       *sql.DB // as owner
	log      *logBuffer
	stop     func() int // asks the server to stop, waits for its end and returns the exit code
	client   *http.Client
}

var servesLine = regexp.MustCompile(`timedb serves (https?://\S+)`)

// mustAPI starts `timedb api` on dsn as the API's role.
func mustAPI(t testing.TB, dsn string, args ...string) *testServer {
	t.Helper()
	return mustAPIOn(t, dsn, asAppRole(dsn), args...)
}

// mustAPIOn starts `timedb api` on the DSN serving; dsn is the same database as its owner.
func mustAPIOn(t testing.TB, dsn, serving string, args ...string) *testServer {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s := &testServer{dsn: dsn, db: mustOpen(t, dsn), log: &logBuffer{}}
	s.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 100, ExpectContinueTimeout: time.Minute}}
	out, done := &logBuffer{}, make(chan struct{})
	code := -1
	go func() {
		defer close(done)
		env := func(name string) string { return map[string]string{"TIMEDB_DSN": serving}[name] }
		code = run(ctx, append([]string{"api", "--port", "0"}, args...), env, strings.NewReader(""), out, s.log)
	}()
	s.stop = func() int {
		cancel()
		s.client.CloseIdleConnections()
		<-done
		return code
	}
	t.Cleanup(func() {
		s.stop()
		owner, _ := mustParse(t, dsn).User.Password()
		if found := secretsOf(s.log.String(), owner); found != "" { // S6
			t.Errorf("the server's log holds %s", found)
		}
	})
	for s.url == "" {
		if found := servesLine.FindStringSubmatch(out.String()); found != nil {
			s.url = found[1]
			break
		}
		select {
		case <-done:
			t.Fatalf("timedb api ended with exit %d: %s", code, s.log)
		case <-time.After(time.Millisecond):
		}
	}
	return s
}

var wholeKey = regexp.MustCompile(`tdb_[a-zA-Z0-9]{8}_[A-Za-z0-9_-]{40}`)

// mustServer starts the API on a database of its own, with users_table.
func mustServer(t testing.TB, args ...string) *testServer {
	t.Helper()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	return mustAPI(t, dsn, args...)
}

// mustUser creates a user on the command line and returns the key.
func (s *testServer) mustUser(t testing.TB, tenant, email string) string {
	t.Helper()
	key, _ := mustRun(t, 0, s.dsn, "", "users", "create", "-q", "-t", tenant, "-e", email)
	return strings.TrimSpace(key)
}

// do sends one request; header lines are "Name: value". A body without Content-Type is JSON. Nothing is retried.
func (s *testServer) do(method, path, key, body string, header ...string) (*http.Response, string, error) {
	r, err := http.NewRequest(method, s.url+path, strings.NewReader(body))
	if err != nil {
		return nil, "", err
	}
	if key != "" {
		r.Header.Set("X-API-Key", key)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for _, line := range header {
		name, value, _ := strings.Cut(line, ": ")
		if name == "Host" {
			r.Host = value
		} else if name == "X-API-Key" {
			r.Header.Add(name, value)
		} else {
			r.Header.Set(name, value)
		}
	}
	resp, err := s.client.Do(r)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp, string(text), err
}

// must sends one request, which must be answered with the status want, and returns the body.
func (s *testServer) must(t testing.TB, want int, method, path, key, body string, header ...string) string {
	t.Helper()
	resp, text, err := s.do(method, path, key, body, header...)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	if resp.StatusCode != want {
		t.Fatalf("%s %s: status %d, want %d: %s\nrequest: %.2000s", method, path, resp.StatusCode, want, text, body)
	}
	var refusal struct{ Detail string }
	if want >= 400 && method != "HEAD" && (json.Unmarshal([]byte(text), &refusal) != nil || refusal.Detail == "") {
		t.Fatalf("%s %s: status %d without a detail: %q", method, path, want, text)
	}
	return text
}

// mustTenant is mustServer with one user, of tenantA, and that user's key.
func mustTenant(t testing.TB, args ...string) (s *testServer, key string) {
	t.Helper()
	s = mustServer(t, args...)
	return s, s.mustUser(t, tenantA, "a@example.com")
}

// waitUntil returns as soon as the condition holds, and ends the test if it does not within two minutes.
func waitUntil(t testing.TB, condition string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after two minutes it is still not so that %s", condition)
		}
	}
}

// mustDial opens a connection to the server, which the end of the test closes. What is written to it goes as it is. Its
// buffer for reading is small: a client that does not read is noticed soon.
func (s *testServer) mustDial(t testing.TB) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
		t.Fatal(err)
	}
	return conn
}

// requestCase is one request, and of its answer the status and texts that the body must contain.
type requestCase struct {
	name, method, path, body string
	status                   int
	want                     []string
}

// runRequests sends each request with the key, in order, as a subtest.
func (s *testServer) runRequests(t *testing.T, key string, cases []requestCase) {
	t.Helper()
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			text := s.must(t, c.status, c.method, c.path, key, c.body)
			for _, want := range c.want {
				if !strings.Contains(text, want) {
					t.Errorf("%s %s %.300s: body %q, want %q in it", c.method, c.path, c.body, text, want)
				}
			}
		})
	}
}

// httpCase is one request and its answer: the status, and texts that the body must contain.
type httpCase struct {
	method, path, body string
	status             int
	want               []string
}

func (s *testServer) mustAll(t *testing.T, key string, cases []httpCase) {
	t.Helper()
	for _, c := range cases {
		text := s.must(t, c.status, c.method, c.path, key, c.body)
		for _, want := range c.want {
			if !strings.Contains(text, want) {
				t.Errorf("%s %s %.300s: body %q, want %q in it", c.method, c.path, c.body, text, want)
			}
		}
	}
}

// mustRaw sends bytes as they are and returns the first line of the answer.
func (s *testServer) mustRaw(t testing.TB, request string) string {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go io.WriteString(conn, request) // the server may answer, and close, before it has read all
	answer := make([]byte, 100)
	n, err := io.ReadAtLeast(conn, answer, 15)
	if err != nil {
		t.Fatalf("no answer: %v", err)
	}
	line, _, _ := strings.Cut(string(answer[:n]), "\r\n")
	return line
}

// mustDecode reads a JSON body into a T.
func mustDecode[T any](t testing.TB, text string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v: %.500s", err, text)
	}
	return v
}

// stored is how much there is in the three data tables: it tells whether anything was stored.
func (s *testServer) stored(t testing.TB) string {
	t.Helper()
	return mustQuery(t, s.db, `SELECT concat_ws(' ', (SELECT count(*) FROM runs_table), (SELECT count(*) FROM series_table),
		(SELECT count(*) FROM values_table), (SELECT sum(cardinality("values")) FROM values_table))`)
}

// relations lists what is in a schema: tables, views, sequences, indexes and functions.
func relations(t testing.TB, db *sql.DB, schema string) string {
	t.Helper()
	return mustQuery(t, db, `SELECT string_agg(name, ' ' ORDER BY name) FROM (
		SELECT relname::text AS name FROM pg_class WHERE relnamespace = to_regnamespace($1)
		UNION ALL SELECT proname::text FROM pg_proc WHERE pronamespace = to_regnamespace($1)) AS x`, pq.QuoteIdentifier(schema))
}

// users is a digest of all that users_table holds.
func users(t testing.TB, db *sql.DB) string {
	t.Helper()
	return mustQuery(t, db, `SELECT md5(string_agg(u::text, ',' ORDER BY user_id)) FROM users_table u`)
}

func gzipped(text string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	io.WriteString(w, text)
	w.Close()
	return b.String()
}

func mustUnzip(t testing.TB, text string) string {
	t.Helper()
	r, err := gzip.NewReader(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(plain)
}

// together calls fn n times at once and waits for all.
func together(n int, fn func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { fn(i) })
	}
	wg.Wait()
}

const (
	noKey  = `{"detail":"API key required. Please provide X-API-Key header."}` + "\n"
	badKey = `{"detail":"Invalid or inactive API key."}` + "\n"
)

// minimal requests that succeed for a key that may do them.
const (
	emptyRun = `{"run_start_time":"2025-01-01T00:00:00Z","value_rows":[]}`
	oneValue = `{"run_start_time":"2025-01-01T00:00:00Z","known_time":"2025-01-01T00:00:00Z","value_rows":[
		{"valid_time":"2025-01-01T00:00:00Z","value_key":"load","value":1}]}`
)

func TestPageRunsNothingButItsOwnScript(t *testing.T) { // script/browser sees that browsers mind it
	t.Parallel()
	s := mustServer(t)
	resp, page, err := s.do("GET", "/docs", "", "")
	if err != nil || resp.Header.Get("Content-Type") != "text/html; charset=utf-8" {
		t.Fatal(resp, err)
	}
	policy := resp.Header.Get("Content-Security-Policy")
	for _, tag := range []string{"script", "style"} {
		if strings.Count(page, "<"+tag) != 1 || strings.Count(page, "</"+tag+">") != 1 {
			t.Errorf("there is not just one <%s>", tag)
		}
		_, inline, _ := strings.Cut(page, "<"+tag+">")
		inline, _, _ = strings.Cut(inline, "</"+tag+">")
		digest := sha256.Sum256([]byte(inline))
		if want := fmt.Sprintf("; %s-src 'sha256-%s'", tag, base64.StdEncoding.EncodeToString(digest[:])); !strings.Contains(policy, want) || inline == "" {
			t.Errorf("the policy %q lacks %q", policy, want)
		}
	}
	if !strings.HasPrefix(policy, "default-src 'none'; ") || strings.Contains(policy, "unsafe") || !strings.Contains(policy, "frame-ancestors 'none'") {
		t.Errorf("the policy is %q", policy)
	}
	if found := regexp.MustCompile(`innerHTML|insertAdjacentHTML|document\.write|eval\(|\bsrc=|Storage|https?://`).FindString(
		strings.ReplaceAll(page, "http://www.w3.org/2000/svg", "")); found != "" {
		t.Errorf("the page has %q", found)
	}
}

func TestKnownPathsAnswerOtherMethodsWithAllow(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	for path, allow := range map[string]string{
		"/upload": "POST", "/values": "GET PUT", "/series": "POST", "/list_timeseries": "GET", "/": "GET", "/docs": "GET",
	} {
		resp, _, err := s.do("DELETE", path, key, "")
		if err != nil || resp.StatusCode != 405 {
			t.Errorf("DELETE %s: %v, %v, want 405", path, resp, err)
			continue
		}
		for _, method := range strings.Fields(allow) {
			if !strings.Contains(resp.Header.Get("Allow"), method) {
				t.Errorf("DELETE %s: Allow %q, want %s in it", path, resp.Header.Get("Allow"), method)
			}
		}
	}
	for _, path := range []string{"/nope", "/values/x", "/VALUES"} {
		s.must(t, 404, "GET", path, key, "")
	}
}

func TestRootAndHealthNeedNoKey(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	root := mustDecode[map[string]any](t, s.must(t, 200, "GET", "/", "", ""))
	if root["name"] != "TimeDB API" {
		t.Errorf("name is %v", root["name"])
	}
	for _, field := range []string{"version", "description", "endpoints", "authentication", "admin_note"} {
		if root[field] == nil {
			t.Errorf("GET / has no %s", field)
		}
	}
	words := map[string]string{"open": "open", "read": "needs an API key", "write": "needs an API key that may write"}
	endpoints := map[string]any{}
	for _, rt := range (&server{}).routes() {
		endpoints[strings.TrimSuffix(rt.pattern, "{$}")] = words[rt.access]
	}
	if !reflect.DeepEqual(root["endpoints"], any(endpoints)) || root["version"] != release {
		t.Errorf("GET / tells of version %v and %v; the routes are %v", root["version"], root["endpoints"], endpoints)
	}
	if how, _ := root["authentication"].(map[string]any); how["header"] != "X-API-Key" || how["method"] == nil || how["note"] == nil {
		t.Errorf("authentication is %v", how)
	}
	if text := s.must(t, 200, "GET", "/healthz", "", ""); strings.TrimSpace(text) != `{"status":"ok"}` {
		t.Errorf("GET /healthz: %q", text)
	}
}

func TestHeadersOver16KiBAreRefused(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	for size, want := range map[int]string{15 << 10: " 401 ", 17 << 10: " 431 ", 200 << 10: " 431 "} {
		request := "GET /values HTTP/1.1\r\nHost: x\r\nX-Padding: " + strings.Repeat("p", size) + "\r\n\r\n"
		if line := s.mustRaw(t, request); !strings.Contains(line, want) {
			t.Errorf("a header of %d bytes: %q, want %s", size, line, want)
		}
	}
}

func TestBugIsA500ThatExplainsNothing(t *testing.T) { // S11, S25
	var log logBuffer
	absent := func(context.Context) (bool, error) { return false, nil }
	s := httptest.NewServer(newServer(nil, nil, &authenticator{usersTableExists: absent}, slog.New(slog.NewTextHandler(&log, nil))))
	defer s.Close()
	resp, err := http.Get(s.URL + "/list_timeseries") // without a store the handler panics
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != 500 || string(body) != `{"detail":"Internal server error."}`+"\n" || !strings.Contains(log.String(), "nil pointer") {
		t.Errorf("a panic: %v %q, log %q", resp, body, log.String())
	}
}

func TestSlowReaderIsCutOff(t *testing.T) { // S20
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	mustManyValues(t, s, key, 250_000)
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	fmt.Fprintf(conn, "GET /values HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\n\r\n", key)
	for wait := 0; !strings.Contains(s.log.String(), "broken=true"); wait++ {
		if wait > 1200 {
			t.Fatal("a client that does not read its answer is served for ever")
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// As many clients as there are places for large requests read slowly, or send slowly: one more of their kind is told so at
// once, and small requests are served.
func TestLargeRequestsLeaveRoomForSmallOnes(t *testing.T) { // S23
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	mustManyValues(t, s, key, 400_000)
	address := strings.TrimPrefix(s.url, "http://")
	var held []net.Conn
	hold := func(request string) {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conn.(*net.TCPConn).SetReadBuffer(4 << 10)
		io.WriteString(conn, request)
		held = append(held, conn)
	}
	header := "Host: x\r\nX-API-Key: " + key + "\r\n"
	read := "GET /values HTTP/1.1\r\n" + header + "\r\n" // whose answer is never read
	for range maxLarge / 2 {
		hold(read)
		hold(fmt.Sprintf("POST /upload HTTP/1.1\r\n%sContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s",
			header, 3*largeBody, "{"+strings.Repeat(" ", 2*largeBody+1)))
	}
	refused := func() bool { // a read with lead counts as large, however little it answers
		resp, _, err := s.do("GET", "/values?lead=1h&limit=1", key, "")
		return err == nil && resp.StatusCode == 503 && resp.Header.Get("Retry-After") != ""
	}
	for !refused() { // this question may have had the place of one of them
		hold(read)
	}
	if resp, _, err := s.do("POST", "/upload", key, runWith("", at("2030-01-01", "1"))+strings.Repeat(" ", 2*largeBody)); err != nil || resp.StatusCode != 503 {
		t.Errorf("a large body beside them: %v %v, want 503", resp, err)
	}
	if resp, _, err := s.do("POST", "/upload", key, gzipped(runWith("", at("2030-01-01", "1"))+strings.Repeat(" ", 2*largeBody)), "Content-Encoding: gzip"); err != nil || resp.StatusCode != 503 {
		t.Errorf("a body that is large once unpacked: %v %v, want 503", resp, err)
	}
	for path, body := range map[string]string{"/values?bucket=P1D&agg=sum": "", "/values?lead=1h&limit=1": "", "/values": update(`"value":1`)} {
		method := map[bool]string{true: "GET", false: "PUT"}[body == ""]
		if resp, _, err := s.do(method, path, key, body); err != nil || resp.StatusCode != 503 {
			t.Errorf("%s %s: %v %v, want 503", method, path, resp, err)
		}
	}
	for range 20 {
		s.must(t, 200, "GET", "/values?limit=10", key, "")
		s.must(t, 200, "POST", "/series", key, `{"name":"small"}`)
		s.must(t, 200, "POST", "/upload", key, oneValue)
		s.must(t, 200, "GET", "/healthz", "", "")
	}
	for _, conn := range held {
		conn.Close()
	}
	for refused() { // and then there is room again
		time.Sleep(time.Millisecond)
	}
	s.must(t, 200, "POST", "/upload", key, runWith("", at("2030-01-02", "1"))+strings.Repeat(" ", 2*largeBody))
}

// encoding/json goes on with what it has buffered when an error comes with bytes: a body must not be read on to its end so.
func TestRefusedLargeBodyIsNotDecodedToItsEnd(t *testing.T) { // S23
	json, csv := uploadBodies(400_000)
	for kind, text := range map[string]string{"application/json": json, "text/csv": csv} {
		var large atomic.Int64
		large.Store(maxLarge)
		r := httptest.NewRequest("POST", "/upload", strings.NewReader(text))
		r.Header.Set("Content-Type", kind)
		b := openBody(&response{ResponseWriter: httptest.NewRecorder(), large: &large}, r, kind)
		u := &upload{points: map[seriesRef][]point{}}
		var err error
		if kind == "text/csv" {
			err = u.decodeCSV(b)
		} else {
			err = fields{"run_start_time": new(micros), "value_rows": list(u.add)}.decodeJSON(b)
		}
		if refused, ok := errors.AsType[*apiError](err); !ok || refused.status != 503 {
			t.Errorf("%s beyond the limit: %v", kind, err)
		}
		large.Store(0) // a place that is free again is too late for it
		if _, again := b.Read(make([]byte, 1)); again != err {
			t.Errorf("%s: a body that was refused is then read: %v", kind, again)
		}
		if b.size > 2*largeBody || u.rows > 60_000 {
			t.Errorf("%s: %d bytes and %d rows were read of a body that was refused", kind, b.size, u.rows)
		}
	}
}

// Many small things take much more memory than their text: they are refused before they are decoded.
func TestLongListsAreRefusedBeforeTheyAreDecoded(t *testing.T) { // S23
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	for path, c := range map[string]struct{ method, body, want string }{
		"/upload": {"POST", `{"run_start_time":"2025-01-01","series_descriptions":{"k":"` + strings.Repeat(`","k":"`, 200_000) + `"},"value_rows":[]}`,
			"series_descriptions: expected at most 1 MiB"},
		"/values": {"PUT", `{"updates":[{"series_key":"load","valid_time":"2025-01-01","tags":["a"` + strings.Repeat(`,"a"`, 300_000) + `]}]}`,
			"updates[0]: expected at most 1 MiB"},
	} {
		if got := s.must(t, 422, c.method, path, key, c.body); !strings.Contains(got, c.want) {
			t.Errorf("%s: got %s, want %s", path, got, c.want)
		}
	}
}

func TestUploadOfTooManySeriesIs422AndStoresNothing(t *testing.T) { // S23
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	body := []byte("valid_time,value_key,value\n")
	for i := range maxSeries + 1 {
		body = fmt.Appendf(body, "2025-01-01,%d,1\n", i)
	}
	answer := s.must(t, 422, "POST", "/upload?run_start_time=2025-01-01", key, string(body), "Content-Type: text/csv")
	if want := fmt.Sprintf("line[%d].series: expected at most 100000 in one upload", maxSeries+2); !strings.Contains(answer, want) {
		t.Errorf("got %s, want %s", answer, want)
	}
	if n := mustQuery(t, s.db, `SELECT count(*) FROM series_table`); n != "0" {
		t.Errorf("%s series are stored", n)
	}
}

// encoding/json looks through the white space that it has from its beginning each time that it gets more: in small pieces that
// is quadratic, so a body hands on whole pieces, however small those that arrive.
func TestBodyIsHandedOnInWholePieces(t *testing.T) { // S21
	var large atomic.Int64
	r := httptest.NewRequest("POST", "/upload", iotest.OneByteReader(strings.NewReader(strings.Repeat(" ", 2500))))
	r.Header.Set("Content-Type", "text/csv")
	b := openBody(&response{ResponseWriter: httptest.NewRecorder(), large: &large}, r, "text/csv")
	for _, want := range []int{1000, 1000, 500, 0} {
		if n, err := b.Read(make([]byte, 1000)); n != want || (err == io.EOF) != (n == 0) {
			t.Errorf("%d bytes and %v, want %d", n, err, want)
		}
	}
}

// A client that is still sending when its body is refused has to get the answer, not a broken connection.
func TestRefusalReachesAClientThatIsStillSending(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	rows := strings.Repeat(at("2025-01-01", "1")+",", 300_000)
	body := runWith("", at("never", "1"), rows[:len(rows)-1])
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /upload HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", key, len(body))
	if _, err := io.WriteString(conn, body); err != nil {
		t.Errorf("while sending: %v", err)
	}
	answer := make([]byte, 12)
	if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != "HTTP/1.1 422" {
		t.Errorf("%q %v", answer, err)
	}
}

// An answer that nobody reads must hold neither a connection to the database nor the place of a request that needs one.
func TestClientsThatDoNotReadKeepNobodyWaiting(t *testing.T) { // S20, S23
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	mustExec(t, s.db, `INSERT INTO series_table (tenant_id, series_key, unit)
		SELECT $1, repeat('long ', 80) || i, 'MW' FROM generate_series(1, 40000) AS i`, tenantA)
	for range poolSize + 5 {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.(*net.TCPConn).SetReadBuffer(4096)
		fmt.Fprintf(conn, "GET /list_timeseries HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\n\r\n", key)
		if _, err := io.ReadFull(conn, make([]byte, 16)); err != nil { // it has begun
			t.Fatal(err)
		}
	}
	s.must(t, 200, "GET", "/values?limit=1", key, "")
}

func TestSlowHeadersKeepNobodyOut(t *testing.T) { // S20
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	var slow []net.Conn
	for range 1000 {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, "GET /values HTTP/1.1\r\nHost: x\r\nX-Slow: ")
		slow = append(slow, conn)
	}
	for range 20 {
		s.must(t, 200, "GET", "/list_timeseries", key, "")
	}
	for _, conn := range slow { // readHeaderTimeout ends each; without it this would wait for ever
		conn.SetReadDeadline(time.Now().Add(10 * readHeaderTimeout))
		if _, err := io.Copy(io.Discard, conn); err != nil {
			t.Fatalf("a connection that never sent its header was kept: %v", err)
		}
	}
}

// uploadAnswer is what POST /upload answers.
type uploadAnswer struct {
	RunID     string            `json:"run_id"`
	Message   string            `json:"message"`
	SeriesIDs map[string]string `json:"series_ids"`
	Rows      int               `json:"rows_inserted"`
}

// runWith is an upload of the given rows, with more members before them.
func runWith(more string, rows ...string) string {
	return `{"run_start_time":"2025-01-01T00:00:00Z",` + more + `"value_rows":[` + strings.Join(rows, ",") + `]}`
}

// at is a row of the series load.
func at(validTime, value string, more ...string) string {
	return `{"valid_time":"` + validTime + `","value_key":"load","value":` + value + strings.Join(more, "") + `}`
}

func TestUploadAnswersAndStoresTheRun(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	body := `{"workflow_id":"day-ahead","run_start_time":"2025-01-01 06:00","run_finish_time":"2025-01-01T06:05:00.25+00:00","known_time":"2025-01-01T07:00:00+01:00",
		"run_params":{"model":"v2","n":[1,2.5]},"series_descriptions":{"load":"Load in MW"},"tenant_id":"` + tenantA + `","value_rows":[
		{"valid_time":"2025-01-02T01:00:00Z","value_key":"load","value":20},{"valid_time":"2025-01-02","value_key":"load","value":null},
		{"valid_time":"2025-01-02T00:00:00Z","valid_time_end":"2025-01-02T01:00:00Z","value_key":"wind","value":-0.5}]}`
	got := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", key, body))
	if got.Message != "Run created successfully" || got.Rows != 3 || len(got.SeriesIDs) != 2 || len(got.RunID) != 36 {
		t.Errorf("POST /upload answers %+v", got)
	}
	runs := s.must(t, 200, "GET", "/runs", key, "")
	for _, want := range []string{`"run_id":"` + got.RunID + `"`, `"workflow_id":"day-ahead"`, `"run_start_time":"2025-01-01T06:00:00+00:00"`,
		`"run_finish_time":"2025-01-01T06:05:00.250000+00:00"`, `"known_time":"2025-01-01T06:00:00+00:00"`, `"changed_by":"a@example.com"`, `"rows":3`, `"inserted_at":"20`} {
		if !strings.Contains(runs, want) {
			t.Errorf("GET /runs: %s, want %s in it", runs, want)
		}
	}
	want := got.RunID + ` day-ahead 2025-01-01 06:00:00 2025-01-01 06:05:00.25 2025-01-01 06:00:00 ` +
		`{"n": [1, 2.5], "model": "v2"} 3 a@example.com`
	if run := mustQuery(t, s.db, `SELECT concat_ws(' ', run_id, workflow_id, run_start_time AT TIME ZONE 'UTC',
		run_finish_time AT TIME ZONE 'UTC', known_time AT TIME ZONE 'UTC', run_params, rows_inserted, changed_by)
		FROM runs_table`); run != want {
		t.Errorf("the run is stored as %s\nwant %s", run, want)
	}
	type entry struct {
		Key         string  `json:"series_key"`
		Description *string `json:"description"`
		Unit        string  `json:"unit"`
	}
	list := mustDecode[map[string]entry](t, s.must(t, 200, "GET", "/list_timeseries", key, ""))
	load, wind := list[got.SeriesIDs["load"]], list[got.SeriesIDs["wind"]]
	if len(list) != 2 || load.Key != "load" || load.Description == nil || *load.Description != "Load in MW" ||
		load.Unit != "dimensionless" || wind.Description != nil {
		t.Errorf("GET /list_timeseries: %+v", list)
	}
	// Without known_time it is the database's now; without workflow_id it is api-workflow.
	before := mustQuery(t, s.db, `SELECT clock_timestamp()`)
	next := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", key, runWith("", at("2025-01-02", "1"))))
	if next.SeriesIDs["load"] != got.SeriesIDs["load"] {
		t.Error("the same value_key became another series")
	}
	if mustQuery(t, s.db, `SELECT workflow_id FROM runs_table WHERE known_time BETWEEN $1 AND clock_timestamp()`,
		before) != "api-workflow" {
		t.Error("without known_time and workflow_id the run is not as documented")
	}
	for query, want := range map[string]string{"?workflow_id=day-ahead": got.RunID, "?limit=1": next.RunID, "?end_known=2025-01-01T06:00:00Z": "",
		"?start_known=2025-01-01T06:00:00Z&end_known=2025-01-01T06:00:01Z": got.RunID, "?workflow_id=other": ""} {
		text := s.must(t, 200, "GET", "/runs"+query, key, "")
		if n := strings.Count(text, `"run_id"`); want == "" && n != 0 || want != "" && (n != 1 || !strings.Contains(text, want)) {
			t.Errorf("GET /runs%s: %s, want run %q", query, text, want)
		}
	}
	if text := s.must(t, 200, "GET", "/runs", key, ""); strings.Index(text, next.RunID) > strings.Index(text, got.RunID) {
		t.Error("GET /runs does not show the newest known first")
	}
	for _, query := range []string{"?limit=0", "?limit=x", "?nope=1", "?start_known=x", "?start_known=2025-01-02&end_known=2025-01-01"} {
		s.must(t, 422, "GET", "/runs"+query, key, "")
	}
}

func TestBadUploadIsRefusedAndStoresNothing(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, other := s.mustUser(t, tenantA, "a@example.com"), s.mustUser(t, tenantB, "b@example.com")
	seriesA := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", key,
		runWith(`"run_id":"`+nobody+`",`, at("2025-01-01", "1")))).SeriesIDs["load"]
	seriesB := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", other, oneValue)).SeriesIDs["load"]
	good := at("2025-02-01T00:00:00Z", "1")
	row := func(members string) string { return runWith("", good, `{`+members+`}`) } // after a good row, to see that all or nothing holds
	before := s.stored(t)
	jsonCases := []struct {
		body   string
		status int
		want   string // in the detail: the field above all
	}{
		{`{`, 422, "body"}, {``, 415, "Content-Type"}, {`[]`, 422, "body"}, {`null`, 422, "body"}, {`"text"`, 422, "body"},
		{`{"run_start_time"`, 422, "early"},
		{runWith("", good) + ` {}`, 422, "body"}, {runWith("", good) + `x`, 422, "body"}, {runWith("", good)[:60], 422, "value_rows"},
		{runWith("", good+","), 422, "value_rows"}, {runWith("", good+"]"), 422, ""},
		{`{"value_rows":[` + good + `]}`, 422, "run_start_time"},
		{`{"run_start_time":null,"value_rows":[` + good + `]}`, 422, "run_start_time"},
		{`{"run_start_time":5,"value_rows":[]}`, 422, "run_start_time"},
		{`{"run_start_time":"yesterday","value_rows":[]}`, 422, "run_start_time"},
		{runWith(`"run_finish_time":"2024-12-31T23:59:59Z",`, good), 422, "run_finish_time"},
		{runWith(`"known_time":"soon",`, good), 422, "known_time"},
		{runWith(`"workflow_id":7,`, good), 422, "workflow_id"}, {runWith(`"workflow_id":" ",`, good), 422, "workflow_id"},
		{runWith(`"workflow_id":"a\u0000b",`, good), 422, "workflow_id"},
		{runWith("\"workflow_id\":\"a\xffb\",", good), 422, "workflow_id"},
		{runWith(`"run_params":[],`, good), 422, "run_params"}, {runWith(`"run_params":"x",`, good), 422, "run_params"},
		{runWith(`"run_params":5,`, good), 422, "run_params"},
		{runWith(`"run_params":{"a":"\u0000"},`, good), 422, "run_params"},
		{runWith(`"run_params":{"a":"\ud800"},`, good), 422, "run_params"},
		{runWith("\"run_params\":{\"a\":\"\xff\"},", good), 422, "run_params"},
		{runWith(`"run_params":`+strings.Repeat(`{"a":`, 100_000)+`1`+strings.Repeat(`}`, 100_000)+`,`, good), 422, "run_params"},
		{runWith(`"run_params":`+strings.Repeat(`[`, 9_000)+strings.Repeat(`]`, 9_000)+`,`, good), 422, "run_params"},
		{runWith(`"run_params":`+strings.Repeat(`{"a":`, 2_500)+`1`+strings.Repeat(`}`, 2_500)+`,"nope":1,`, good), 422, "nope"},
		{runWith(`"series_descriptions":[],`, good), 422, "series_descriptions"},
		{runWith(`"series_descriptions":{"load":5},`, good), 422, "series_descriptions"},
		{runWith(`"run_id":"nope",`, good), 422, "run_id"}, {runWith(`"run_id":5,`, good), 422, "run_id"},
		{runWith(`"run_id":"`+nobody+`0",`, good), 422, "run_id"},
		{runWith(`"run_id":"`+nobody+`",`, good), 409, "run_id"}, {runWith(`"tenant_id":"`+tenantB+`",`, good), 403, "tenant_id"},
		{runWith(`"extra":1,`, good), 422, "extra"}, {runWith(`"Workflow_ID":"x",`, good), 422, "Workflow_ID"},
		{runWith(`"VALUE_ROWS":[],`, good), 422, "VALUE_ROWS"},
		{runWith(`"workflow_id":"a","workflow_id":"b",`, good), 422, "workflow_id"},
		{runWith(`"value_rows":[],`, good), 422, "value_rows"},
		{`{"run_start_time":"2025-01-01","value_rows":{}}`, 422, "value_rows"},
		{`{"run_start_time":"2025-01-01","value_rows":null}`, 422, "value_rows"},
		{runWith("", good, `5`), 422, "value_rows[1]"}, {runWith("", good, `[]`), 422, "value_rows[1]"},
		{runWith("", good, `null`), 422, "value_rows[1]"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":1,"extra":1`), 422, "extra"},
		{row(`"value_key":"load","value":1`), 422, "value_rows[1].valid_time"},
		{row(`"valid_time":null,"value_key":"load","value":1`), 422, "value_rows[1].valid_time"},
		{row(`"valid_time":5,"value_key":"load","value":1`), 422, "valid_time"},
		{row(`"valid_time":"2025-01-01","value":1`), 422, "value_rows[1].value_key"},
		{row(`"valid_time":"2025-01-01","value_key":"","value":1`), 422, "value_key"},
		{row(`"valid_time":"2025-01-01","value_key":" \t","value":1`), 422, "value_key"},
		{row(`"valid_time":"2025-01-01","value_key":5,"value":1`), 422, "value_key"},
		{row(`"valid_time":"2025-01-01","value_key":"a\u0000","value":1`), 422, "value_key"},
		{row("\"valid_time\":\"2025-01-01\",\"value_key\":\"\xff\",\"value\":1"), 422, "value_key"},
		{row(`"valid_time":"2025-01-01","value_key":"load"`), 422, "value_rows[1].value"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":"1"`), 422, "value"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":true`), 422, "value"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":NaN`), 422, "value_rows[1]"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":1e999`), 422, "value"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":-Infinity`), 422, "value_rows[1]"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":"NaN"`), 422, "value"},
		{row(`"valid_time":"2025-01-01","value_key":"load","value":[1]`), 422, "value"},
		{row(`"valid_time":"2025-01-01","valid_time_end":"2025-01-01","value_key":"load","value":1`), 422, "value_rows[1].valid_time_end"},
		{row(`"valid_time":"2025-01-02","valid_time_end":"2025-01-01T23:00-01:00","value_key":"load","value":1`), 422, "valid_time_end"},
		{row(`"valid_time":"2025-01-01","valid_time_end":"later","value_key":"load","value":1`), 422, "valid_time_end"},
		{row(`"valid_time":"2025-01-01","series_id":"nope","value":1`), 422, "series_id"},
		{row(`"valid_time":"2025-01-01","series_id":"` + nobody + `","value":1`), 404, "series_id"},
		{row(`"valid_time":"2025-01-01","series_id":"` + seriesB + `","value":1`), 404, "series_id"},
		{row(`"valid_time":"2025-01-01","series_id":"` + seriesA + `","value_key":"wind","value":1`), 422, "wind"},
		{runWith("", good, good), 422, "2025-02-01T00:00:00"}, {runWith("", good, at("2025-02-01T01:00:00+01:00", "2")), 422, "twice"},
		{runWith("", good, `{"valid_time":"2025-02-01","series_id":"`+seriesA+`","value":1}`), 422, "twice"},
		{runWith("", at("2025-01-01", "1", `,"valid_time_end":"2025-01-02"`),
			at("2025-01-01", "2", `,"valid_time_end":"2025-01-02T00:00:00Z"`)), 422, "twice"},
		{runWith("", at("2025-01-01T00:00:00.1234567Z", "1"), at("2025-01-01T00:00:00.1234569Z", "1")), 422, "twice"},
	}
	for _, time := range []string{"", "yesterday", "1735689600", "2025", "2025-01", "2025-1-1", "2025-13-01", "2025-02-30",
		"2025-02-29T00:00:00Z", "20250101T000000Z",
		"2025-01-01T24:00:01Z", "2025-01-01T25:00:00Z", "2025-01-01T00:60:00Z", "2025-01-01T00:00:61Z",
		"2025-01-01T00:00:00+99:00", "2025-01-01T00:00:00 UTC", "2025-01-01T1:00:00Z",
		"2025-01-01T00:00:00Z[UTC]", "0001-01-01T00:00:00Z", "1676-12-31T23:59:59Z", "2263-01-01T00:00:00Z", "9999-12-31",
		"12025-01-01", "-2025-01-01", "infinity", "now",
		"2025-01-01T00:00:00Zx", "2025-01-01T00:00:00.Z", " 2025-01-01"} {
		jsonCases = append(jsonCases, struct {
			body   string
			status int
			want   string
		}{row(`"valid_time":"` + time + `","value_key":"load","value":1`), 422, "valid_time"})
	}
	refused := func(want int, detail, path, body string, header ...string) {
		t.Helper()
		text := s.must(t, want, "POST", path, key, body, header...)
		if !strings.Contains(text, detail) {
			t.Errorf("%.300s: %s, want %q in it", body, text, detail)
		}
		if s.stored(t) != before {
			t.Fatalf("%.300s: refused, and yet something was stored", body)
		}
	}
	for _, c := range jsonCases {
		refused(c.status, c.want, "/upload", c.body)
	}
	refused(422, "nope", "/upload?nope=1", runWith("", good))
	refused(422, "workflow_id", "/upload?workflow_id=x", runWith("", good))
	for _, c := range []struct{ query, body, want string }{
		{"", "valid_time,value_key,value\n", "run_start_time"}, {"run_start_time=x", "valid_time,value_key,value\n", "run_start_time"},
		{"run_start_time=2025-01-01&value_rows=x", "valid_time,value_key,value\n", "value_rows"}, {"run_start_time=2025-01-01&nope=1", "", "nope"},
		{"run_start_time=2025-01-01&run_start_time=2025-01-02", "valid_time,value_key,value\n", "run_start_time"},
		{"run_start_time=2025-01-01&run_params=x", "valid_time,value_key,value\n", "run_params"}, {"run_start_time=2025-01-01", "", "header"},
		{"run_start_time=2025-01-01", "valid_time,value_key\n2025-01-01,load\n", "value"}, {"run_start_time=2025-01-01", "valid_time,value_key,value,extra\n", "extra"},
		{"run_start_time=2025-01-01", "valid_time,value,value_key,value\n", "value"}, {"run_start_time=2025-01-01", "Valid_Time,value_key,value\n", "Valid_Time"},
		{"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,load,1\n2025-02-02,load\n", "3"},
		{"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,load,1\n2025-02-02,load,one\n", "value"},
		{"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,load,Infinity\n", "value"}, {"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,load,1e999\n", "value"},
		{"run_start_time=2025-01-01", "valid_time,value_key,value\n,load,1\n", "valid_time"}, {"run_start_time=2025-01-01", "valid_time,value_key,value\nsoon,load,1\n", "valid_time"},
		{"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,,1\n", "value_key"}, {"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,\xff,1\n", "value_key"},
		{"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,\"load,1\n", ""}, {"run_start_time=2025-01-01", "valid_time,value_key,value\n2025-02-01,load,1\n2025-02-01 00:00,load,2\n", "twice"},
	} {
		refused(422, c.want, "/upload?"+c.query, c.body, "Content-Type: text/csv")
	}
	for body, want := range map[string]string{
		"value\n": "value_key", "valid_time,value_key\n": "value", "value_key,value\n2025,x\n": "valid_time", "valid_time,value\n": "series_id",
		"valid_time,value_key,value\n2025-02-01,load,1_0\n": "line[2].value", "valid_time,value_key,value\n2025-02-01,load,1\n2025-02-01,load,x\n": "line[3].value",
		"valid_time;value_key;value\n": "there are series_id, valid_time", strings.Repeat(",", 1<<20): "lines of at most",
		"valid_time,value_key,value\n2025-02-01,load,1" + strings.Repeat(",", 1<<20): "lines of at most",
		strings.Repeat(`"`+strings.Repeat(",", 4000)+"\n", 1000):                     `missing \"`,
	} {
		refused(422, want, "/upload?run_start_time=2025-01-01", body, "Content-Type: text/csv")
	}
	body := runWith("", good)
	for _, header := range []string{"Content-Type: text/plain",
		"Content-Type: application/x-www-form-urlencoded",
		"Content-Type: nonsense/", "Content-Type: application/json; charset=latin1", "Content-Encoding: br"} {
		name, _, _ := strings.Cut(header, ":")
		refused(415, name, "/upload", body, header)
	}
	zipped := gzipped(body)
	refused(422, "body", "/upload", body, "Content-Encoding: gzip")
	refused(422, "", "/upload", zipped[:len(zipped)-12], "Content-Encoding: gzip")
	refused(422, "", "/upload", zipped[:len(zipped)-6]+"\x00\x00\x00\x00\x00\x00", "Content-Encoding: gzip") // the checksum is wrong
	var bomb bytes.Buffer
	w, _ := gzip.NewWriterLevel(&bomb, gzip.BestSpeed)
	w.Write([]byte(`{"workflow_id":"`))
	for range 200 {
		w.Write(bytes.Repeat([]byte("x"), 1<<20))
	}
	w.Close()
	refused(413, "larger", "/upload", bomb.String(), "Content-Encoding: gzip")
	refused(413, "larger", "/upload", `{"workflow_id":"`+strings.Repeat("x", 80<<20))
	refused(422, "body", "/upload", "{"+strings.Repeat(" ", 4<<20)) // white space between tokens
	refused(422, "body", "/upload", "{")                            // and the server still serves
	if log := s.log.String(); strings.Contains(log, "status=500") {
		t.Errorf("a refused upload was an internal error: %s", log)
	}
}

func TestBodyOfUnknownLengthIsBounded(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	// No Content-Length: http.NewRequest does not know what this reader holds.
	body := io.MultiReader(strings.NewReader(`{"workflow_id":"`), strings.NewReader(strings.Repeat("x", 70<<20)), strings.NewReader(`"}`))
	r, err := http.NewRequest("POST", s.url+"/upload", body)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-API-Key", key)
	r.Header.Set("Content-Type", "application/json")
	resp, err := s.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 413 {
		t.Errorf("70 MiB without a Content-Length: %s, want 413", resp.Status)
	}
}

func TestRefusalDoesNotRepeatALongInput(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	if text := s.must(t, 422, "POST", "/series", key, `{"`+strings.Repeat("x", 1<<20)+`":1}`); len(text) > 4<<10 {
		t.Errorf("the refusal is %d bytes long", len(text))
	}
	if text := s.log.String(); len(text) > 64<<10 {
		t.Errorf("the log is %d bytes long", len(text))
	}
}

// valuesOf reads what is stored under a name, with the name and the id taken out.
func (s *testServer) valuesOf(t *testing.T, key, name string) string {
	id := mustQuery(t, s.db, `SELECT series_id FROM series_table WHERE series_key = $1`, name)
	text := s.must(t, 200, "GET", "/values?mode=overlapping&series_key="+name, key, "")
	text = regexp.MustCompile(`"known_time":"[^"]*"`).ReplaceAllString(text, "")
	return strings.NewReplacer(id, "", `"`+name+`"`, "").Replace(text)
}

func TestCSVAndGzipStoreWhatJSONStores(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	body := runWith("", at("2025-01-01T00:00:00Z", "1.5"), at("2025-01-01T01:00:00+00:00", "null"), at("2025-01-01 02:00", "1e-7"), at("2025-01-01T00:00:00Z", "-3", `,"valid_time_end":"2025-01-02"`))
	csv := "value_key,value,valid_time_end,valid_time\r\nload,1.5,,2025-01-01T00:00:00Z\r\nload,NaN,,2025-01-01T01:00:00+00:00\r\n\"load\",1e-7,,2025-01-01 02:00\nload,-3,2025-01-02,2025-01-01T00:00:00Z"
	const path = "/upload?run_start_time=2025-01-01T00:00:00+00:00&run_params=%7B%22a%22:1%7D&workflow_id=csv"
	named := func(text, name string) string { return strings.ReplaceAll(text, "load", name) }
	s.must(t, 200, "POST", "/upload", key, body)
	s.must(t, 200, "POST", "/upload", key, gzipped(named(body, "zipped")), "Content-Encoding: gzip")
	s.must(t, 200, "POST", path, key, named(csv, "csv"), "Content-Type: text/csv; charset=UTF-8")
	s.must(t, 200, "POST", path, key, named(strings.Replace(csv, "NaN", "", 1), "empty"), "Content-Type: text/csv")
	s.must(t, 200, "POST", path, key, gzipped(named(csv, "both")), "Content-Type: text/csv", "Content-Encoding: gzip")
	s.must(t, 200, "POST", path, key, "\ufeff"+named(csv, "excel"), "Content-Type: text/csv")
	want := s.valuesOf(t, key, "load")
	if strings.Count(want, `"value":`) != 4 || !strings.Contains(want, `"value":null`) {
		t.Errorf("JSON stores %s", want)
	}
	for _, name := range []string{"zipped", "csv", "empty", "both", "excel"} {
		if got := s.valuesOf(t, key, name); got != want {
			t.Errorf("%s stores %s\nJSON stores %s", name, got, want)
		}
	}
	if got := mustQuery(t, s.db, `SELECT count(*) FROM runs_table WHERE workflow_id = 'csv' AND run_params->>'a' = '1'`); got != "4" {
		t.Errorf("%s of 4 CSV uploads have their run_params", got)
	}
}

// answerRow is one row of GET /values.
type answerRow struct {
	Known      *time.Time `json:"known_time"`
	Valid      time.Time  `json:"valid_time"`
	End        *time.Time `json:"valid_time_end"`
	Series     string     `json:"series_id"`
	Key        string     `json:"series_key"`
	Unit       string     `json:"series_unit"`
	Value      *float64   `json:"value"`
	Run        string     `json:"run_id"`
	Change     string     `json:"change_time"`
	ChangedBy  *string    `json:"changed_by"`
	Annotation *string    `json:"annotation"`
	Tags       []string   `json:"tags"`
	Version    int        `json:"version"`
}

type readAnswer struct {
	Count int         `json:"count"`
	Data  []answerRow `json:"data"`
}

// canonical is a JSON object with its members in order and its numbers as they are written.
func canonical(t *testing.T, text string) string {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	b, _ := json.Marshal(v)
	return string(b)
}

func TestRowsAreWrittenAsDocumented(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, series := mustPicture(t, s)
	s.must(t, 200, "POST", "/upload", key, runWith("",
		`{"valid_time":"2025-06-01T02:00:00.000250+02:00","value_key":"a \"quoted\", <ü>\\","value":1e-7}`,
		`{"valid_time":"2025-06-01T02:00:00+02:00","value_key":"a \"quoted\", <ü>\\","value":-1e300}`))
	runOf := func(where string) string {
		return mustQuery(t, s.db, `SELECT run_id FROM values_table v JOIN series_table s USING (tenant_id, series_id) WHERE `+where)
	}
	change := func(where string) string {
		return mustQuery(t, s.db, `SELECT replace(to_char(change_time AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US'), '.000000', '') || '+00:00'
			FROM values_table v JOIN series_table s USING (tenant_id, series_id) WHERE `+where)
	}
	read := func(query string, header ...string) string {
		return s.must(t, 200, "GET", "/values?"+query, key, "", header...)
	}
	load, price := `"series_id":"`+series["load"]+`"`, `"series_id":"`+series["price"]+`"`
	const second = "series_key = 'load' AND version = 2"
	for query, want := range map[string]string{
		"limit=1&series_key=load": `{"valid_time":"2025-01-01T00:00:00+00:00",` + load + `,"value":1.0,"series_key":"load","series_unit":"dimensionless"}`,
		"limit=1&series_key=load&mode=overlapping&start_valid=2025-01-01T02:00:00Z": `{"known_time":"2024-12-31T00:00:00+00:00","valid_time":"2025-01-01T02:00:00+00:00",` + load +
			`,"value":null,"series_key":"load","series_unit":"dimensionless"}`,
		"limit=1&series_key=price": `{"valid_time":"2025-01-01T00:00:00+00:00",` + price + `,"value":10.0,"series_key":"price","series_unit":"dimensionless","valid_time_end":"2025-01-01T01:00:00+00:00"}`,
		"series_key=load&detail=true&start_valid=2025-01-01T02:00:00Z&limit=1": `{"valid_time":"2025-01-01T02:00:00+00:00",` + load + `,"value":3.75,"series_key":"load","series_unit":"dimensionless",` +
			`"run_id":"` + runOf(second) + `","known_time":"2024-12-31T12:00:00+00:00","valid_time_end":null,"change_time":"` + change(second) + `","changed_by":"a@example.com","annotation":"checked","tags":["a","b"],"version":2}`,
		"series_key=price&mode=overlapping&all_versions=true&limit=1": `{"known_time":"2024-12-31T12:00:00+00:00","valid_time":"2025-01-01T00:00:00+00:00",` + price + `,"value":10.0,"series_key":"price","series_unit":"dimensionless",` +
			`"run_id":"` + runOf("series_key = 'price'") + `","valid_time_end":"2025-01-01T01:00:00+00:00","change_time":"` + change("series_key = 'price'") + `","changed_by":"a@example.com","annotation":null,"tags":null,"version":1}`,
	} {
		got := mustDecode[struct{ Data []json.RawMessage }](t, read(query))
		if len(got.Data) != 1 || canonical(t, string(got.Data[0])) != canonical(t, want) {
			t.Errorf("GET /values?%s\nshows %s\nwant  %s", query, got.Data, want)
		}
	}
	odd := mustDecode[readAnswer](t, read("start_valid=2025-06-01"))
	if text := read("start_valid=2025-06-01"); odd.Data[0].Key != `a "quoted", <ü>\` ||
		!strings.Contains(text, `"2025-06-01T00:00:00.000250+00:00"`) ||
		!strings.Contains(text, `"value":1e-07`) || !strings.Contains(text, `"value":-1e+300`) {
		t.Errorf("an odd key, a fraction of a second, extreme values: %s", text)
	}
	const columns = "valid_time,series_id,value,series_key,series_unit,valid_time_end\n"
	id := series["load"]
	csv := columns + "2025-01-01T02:00:00+00:00," + id + `,3.75,"load","dimensionless",` + "\n" +
		"2025-01-01T03:00:00+00:00," + id + `,9.0,"load","dimensionless",` + "\n"
	const window = "series_key=load&start_valid=2025-01-01T02:00:00Z"
	if got := read(window + "&format=csv"); got != csv {
		t.Errorf("format=csv: %q, want %q", got, csv)
	}
	if got := read(window, "Accept: text/csv"); got != csv {
		t.Errorf("Accept: text/csv: %q, want %q", got, csv)
	}
	if got, want := read(window+"&end_known=2024-12-31T12:00:00Z&mode=overlapping&format=csv", "Accept: application/json"), "known_time,"+
		columns+"2024-12-31T00:00:00+00:00,2025-01-01T02:00:00+00:00,"+id+`,,"load","dimensionless",`+"\n"; got != want {
		t.Errorf("a NULL in overlapping CSV: %q, want %q", got, want)
	}
	odd.Data = nil
	text := read("start_valid=2025-06-01T00:00:00.0001Z&format=csv")
	if !strings.Contains(text, `,1e-07,"a ""quoted"", <ü>\","dimensionless",`) {
		t.Errorf("an odd key in CSV: %q", text)
	}
	for _, mode := range []string{"", "&mode=overlapping"} {
		text := read("series_key=load&format=csv&detail=true&start_valid=2025-01-01T02:00:00Z" + mode)
		if !strings.Contains(text, `,"a@example.com","checked","[""a"",""b""]",2`+"\n") {
			t.Errorf("detail in CSV: %q", text)
		}
		// The columns are those of JSON, by the same names and in the same order.
		var names []string
		dec := json.NewDecoder(strings.NewReader(read("series_key=load&detail=true&limit=1" + mode)))
		for range 3 {
			dec.Token()
		}
		for dec.Token(); dec.More(); {
			name, _ := dec.Token()
			names = append(names, name.(string))
			var value any
			dec.Decode(&value)
		}
		if header, _, _ := strings.Cut(text, "\n"); header != strings.Join(names, ",") {
			t.Errorf("the columns of CSV are %s, the members of JSON %q", header, names)
		}
	}
	if got := read("start_valid=2030-01-01&format=csv"); got != columns {
		t.Errorf("nothing to show in CSV: %q", got)
	}
	if got := read("start_valid=2030-01-01"); got != `{"data":[],"count":0}`+"\n" {
		t.Errorf("nothing to show: %q", got)
	}
}

// mustManyValues uploads n values of the series load in steps of a minute.
func mustManyValues(t testing.TB, s *testServer, key string, n int) {
	t.Helper()
	const most = 250_000
	begin := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	for first := 0; first < n; first += most {
		text := []byte(`{"run_start_time":"2020-01-01","known_time":"2020-01-01","value_rows":[`)
		for i := first; i < min(n, first+most); i++ {
			text = begin.Add(time.Duration(i)*time.Minute).AppendFormat(append(text, `{"value_key":"load","valid_time":"`...),
				time.RFC3339)
			text = append(strconv.AppendInt(append(text, `","value":`...), int64(i%1000), 10), ".25},"...)
		}
		s.must(t, 200, "POST", "/upload", key, string(text[:len(text)-1])+"]}")
	}
}

func TestLongResponsesAreCompleteOrVisiblyBroken(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	const n = 1_000_000
	mustManyValues(t, s, key, n)
	window := "/values?end_valid=2020-02-15T00:00:00Z" // 64,800 values
	text := s.must(t, 200, "GET", window, key, "")
	if got := mustDecode[readAnswer](t, text); got.Count != 64_800 || len(got.Data) != 64_800 || len(text) < 5<<20 ||
		got.Data[64_799].Valid.Format("01-02T15:04") != "02-14T23:59" {
		t.Errorf("%d rows, count %d, %d bytes", len(got.Data), got.Count, len(text))
	}
	for header, compressed := range map[string]bool{"gzip": true, "deflate, GZIP;q=0.5": true, "br": false, "gzip;q=0": false,
		"identity": false, "xgzip": false} {
		resp, got, err := s.do("GET", window, key, "", "Accept-Encoding: "+header)
		if err != nil {
			t.Fatal(err)
		}
		zipped := resp.Header.Get("Content-Encoding") == "gzip"
		if zipped != compressed || !strings.Contains(resp.Header.Get("Vary"), "Accept-Encoding") {
			t.Errorf("Accept-Encoding %q: %v", header, resp.Header)
		} else if zipped && (len(got) > len(text)/5 || mustUnzip(t, got) != text) {
			t.Errorf("the compressed response, of %d bytes, differs from the plain one", len(got))
		}
	}
	for _, query := range []string{"", "?mode=overlapping&detail=true", "?format=csv", "?format=json"} {
		r, _ := http.NewRequest("GET", s.url+"/values"+query, nil)
		r.Header.Set("X-API-Key", key)
		if query == "?format=json" {
			r.Header.Set("Accept-Encoding", "gzip") // http.Client asks for it too, and then unpacks it
		}
		resp, err := s.client.Do(r)
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("%v %v", resp, err)
		}
		// The response has begun; the database still has most of it.
		if _, err := io.CopyN(io.Discard, resp.Body, 1000); err != nil {
			t.Fatal(err)
		}
		mustExec(t, s.db, `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
			WHERE datname = current_database() AND usename = $1`, appRole.name)
		size, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err == nil {
			t.Errorf("GET /values%s ended after %d bytes as if it were complete", query, size)
		}
	}
	if line := s.mustRaw(t, "GET /values HTTP/1.0\r\nHost: x\r\nX-API-Key: "+key+"\r\n\r\n"); !strings.Contains(line, " 505 ") {
		t.Errorf("HTTP/1.0, whose client could not see that an answer is broken: %q", line)
	}
	onePiece := s.must(t, 200, "GET", window+"&limit=200", key, "", "Accept-Encoding: identity")
	if _, zipped, err := s.do("GET", window+"&limit=200", key, "", "Accept-Encoding: gzip"); err != nil || mustUnzip(t, zipped) != onePiece {
		t.Error("an answer that was compressed in one piece is not whole")
	}
	s.must(t, 200, "GET", window+"&limit=1", key, "") // what is broken is not used again
	if !strings.Contains(s.log.String(), "broken=true") {
		t.Error("the log does not tell of the broken responses")
	}
}

type object = map[string]any

// document is web/openapi.json: its text, which alone knows the order of members, and what it says.
type document struct {
	t          *testing.T
	text       string
	root       object
	operations map[string]object // by "METHOD path"
	seen       map[string]bool   // answers that were checked, as "METHOD path status type"
}

func mustDocument(t *testing.T) *document {
	t.Helper()
	text, _ := web.ReadFile("web/openapi.json")
	d := &document{t, string(text), mustDecode[object](t, string(text)), map[string]object{}, map[string]bool{}}
	for path, item := range d.at(d.root, "paths") {
		for method, operation := range d.at(item) {
			d.operations[strings.ToUpper(method)+" "+path] = d.at(operation)
		}
	}
	return d
}

// at follows members from a node down, and any $ref on the way. What is not there is an empty object.
func (d *document) at(node any, names ...string) object {
	found, _ := node.(object)
	if ref, ok := found["$ref"].(string); ok {
		return d.at(d.root, append(strings.Split(strings.TrimPrefix(ref, "#/"), "/"), names...)...)
	}
	if len(names) > 0 {
		return d.at(found[names[0]], names[1:]...)
	}
	return found
}

// absent stands for a member that is not there: it satisfies every schema, but shows broken all keywords of it.
type absent struct{}

var jsonTypes = map[string]string{"<nil>": "null", "bool": "boolean", "string": "string", "float64": "number",
	"[]interface {}": "array", "map[string]interface {}": "object"}

// broken says what a decoded JSON value has that its schema does not allow. It knows the keywords that the document uses and
// fails the test at any other, so that none can be written that nothing checks.
func (d *document) broken(schema object, value any) (err error) {
	members, isObject := value.(object)
	elements, isList := value.([]any)
	text, isText := value.(string)
	size, sized := value.(float64) // of a number, or the length
	if isText || isList {
		size, sized = float64(max(len([]rune(text)), len(elements))), true
	}
	within := func(schema, value any) { err = cmp.Or(err, d.broken(schema.(object), value)) }
	for keyword, want := range schema {
		ok := true
		limit, _ := want.(float64)
		list, _ := want.([]any)
		switch keyword {
		case "title", "description", "default", "example", "examples", "contentMediaType":
		case "$ref":
			within(d.at(schema), value)
		case "type":
			list, kind := append(list, want), jsonTypes[fmt.Sprintf("%T", value)]
			ok = slices.Contains(list, any(kind)) || kind == "number" && size == math.Trunc(size) && slices.Contains(list, any("integer"))
		case "const":
			ok = value == want
		case "enum":
			ok = slices.Contains(list, value)
		case "format":
			_, notTime := time.Parse(time.RFC3339, text)
			ok = !isText || want == "date-time" && notTime == nil || want == "uuid" && uuidPattern.MatchString(text)
		case "pattern":
			ok = !isText || regexp.MustCompile(want.(string)).MatchString(text)
		case "minimum", "minLength", "minItems":
			ok = !sized || size >= limit
		case "maximum", "maxLength", "maxItems":
			ok = !sized || size <= limit
		case "items":
			for _, element := range append(slices.Clone(elements), absent{}) {
				within(want, element)
			}
		case "required":
			for _, name := range list {
				_, given := members[name.(string)]
				ok = ok && (given || !isObject)
			}
		case "properties":
			for name, property := range d.at(want) {
				member, given := members[name]
				within(property, map[bool]any{true: member, false: absent{}}[given])
			}
		case "additionalProperties":
			within(d.at(want), absent{})
			for name, member := range members {
				if d.at(schema, "properties")[name] == nil {
					ok = ok && want != false
					within(d.at(want), member)
				}
			}
		case "anyOf", "allOf":
			kept := slices.DeleteFunc(slices.Clone(list), func(s any) bool { return d.broken(s.(object), value) != nil })
			ok = len(kept) == len(list) || keyword == "anyOf" && len(kept) > 0
		default:
			d.t.Fatalf("this test does not know the keyword %s", keyword)
		}
		if value != any(absent{}) && !ok {
			err = fmt.Errorf("%s %.200v is broken by %.200v", keyword, want, value)
		}
	}
	return err
}

// check looks whether an answer to an operation, such as "GET /values", is as the document says, and returns its body.
func (d *document) check(operation string, resp *http.Response, body string) string {
	kind, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	d.seen[fmt.Sprint(operation, " ", resp.StatusCode, " ", kind)] = true
	described := d.at(d.operations[operation], "responses", strconv.Itoa(resp.StatusCode))
	var value any = body
	if json.Unmarshal([]byte(body), &value) != nil && kind == "application/json" {
		d.t.Errorf("%s: no JSON: %q", operation, body)
	}
	schema := d.at(described, "content", kind, "schema")
	err := d.broken(schema, value)
	for name, header := range d.at(described, "headers") {
		err = cmp.Or(err, d.broken(d.at(header, "schema"), resp.Header.Get(name)))
	}
	if err != nil || len(schema) == 0 {
		d.t.Errorf("%s: the document does not describe status %d with %s: %v: %.500s", operation, resp.StatusCode, kind, err, body)
	}
	return body
}

// try sends a request, such as "GET /values?limit=1", which must be answered with the status want and as described.
func (d *document) try(s *testServer, want int, request, key, body string, header ...string) string {
	method, path, _ := strings.Cut(request, " ")
	operation, _, _ := strings.Cut(request, "?")
	resp, text, err := s.do(method, path, key, body, header...)
	if err != nil || resp.StatusCode != want {
		d.t.Fatalf("%s %.300s: %v %v %s, want %d", request, body, err, resp, text, want)
	}
	return d.check(operation, resp, text)
}

func TestDocumentListsTheRoutesAndWhatTheyNeed(t *testing.T) {
	d := mustDocument(t)
	routes, described := map[string]bool{}, map[string]bool{} // whether they are open
	for _, rt := range (&server{}).routes() {
		routes[strings.TrimSuffix(rt.pattern, "{$}")] = rt.access == "open"
	}
	for name, operation := range d.operations {
		security, own := operation["security"].([]any) // without its own the document's holds
		described[name] = own && len(security) == 0
	}
	if !reflect.DeepEqual(routes, described) || fmt.Sprint(d.root["security"]) != "[map[ApiKey:[]]]" {
		t.Errorf("the document describes %v, by security %v; the routes are %v", described, d.root["security"], routes)
	}
	if n := strings.Count(d.text, `"version": "`); n == 0 || n != strings.Count(d.text, `"version": "`+release+`"`) {
		t.Errorf("the document is not of version %s", release)
	}
}

// Every answer that can be provoked must be described, and every one that is described must be provoked.
func TestDocumentDescribesEveryAnswerAndNoOther(t *testing.T) {
	t.Parallel()
	d, s := mustDocument(t), mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	readOnly, _ := mustRun(t, 0, s.dsn, "", "users", "create", "-q", "--read-only", "-t", tenantA, "-e", "r@example.com")
	named := `"run_id":"` + nobody + `",`
	for _, c := range []struct {
		status        int
		request, body string
	}{
		{200, "GET /", ""}, {200, "GET /healthz", ""}, {200, "GET /docs", ""}, {200, "GET /openapi.json", ""},
		{200, "GET /list_timeseries", ""}, {200, "GET /runs", ""}, {200, "GET /values", ""}, {200, "POST /upload", oneValue},
		{200, "POST /upload", runWith(named + `"run_params":{"n":[1]},"series_descriptions":null,`)},
		{200, "POST /upload", runWith("", at("2025-01-02", "null"), at("2025-01-03", "1e300", `,"valid_time_end":"2025-01-04"`))},
		{200, "PUT /values", update(`"value":2.5,"annotation":"why","tags":["b","A"]`)}, {200, "PUT /values", update(`"value":2.5`)},
		{200, "POST /series", `{"name":"s","unit":"MW","description":"d"}`}, {200, "POST /series", `{"name":"s","unit":"MW"}`},
		{200, "GET /values?limit=3", ""}, {200, "GET /values?detail=true", ""}, {200, "GET /values?all_versions=1&mode=overlapping", ""},
		{200, "GET /values?bucket=1h&agg=count", ""}, {200, "GET /values?format=csv&detail=true", ""},
		{200, "GET /values?mode=overlapping&format=csv", ""}, {200, "GET /list_timeseries", ""}, {200, "GET /runs", ""},
		{404, "POST /upload", runWith("", `{"valid_time":"2025-01-01","series_id":"`+nobody+`","value":1}`)},
		{404, "GET /values?series_key=nope", ""}, {404, "PUT /values", strings.Replace(update(`"value":1`), "load", "nope", 1)},
		{409, "POST /upload", runWith(named, at("2025-01-01", "1"))}, {409, "POST /series", `{"name":"s","unit":"kW"}`},
	} {
		d.try(s, c.status, c.request, key, c.body)
	}
	raw := func(s *testServer, operation, request string) {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, request)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		d.check(operation, resp, string(body))
	}
	raw(s, "GET /values", "GET /values HTTP/1.0\r\nX-API-Key: "+key+"\r\n\r\n")
	without := func(failure error, patience time.Duration) *testServer { // a server without a database; patience: for a body
		usersTable := func(context.Context) (bool, error) { return false, failure }
		hs := httptest.NewUnstartedServer(newServer(nil, usersTable, &authenticator{usersTableExists: usersTable}, slog.New(slog.DiscardHandler)))
		hs.Config.ReadTimeout = patience
		hs.Start()
		t.Cleanup(hs.Close)
		return &testServer{url: hs.URL, client: hs.Client()}
	}
	down, bug, hasty := without(io.EOF, 0), without(nil, 0), without(nil, 100*time.Millisecond)
	d.try(down, 503, "GET /healthz", "", "")
	d.try(without(errors.New("a bug"), 0), 500, "GET /healthz", "", "")
	bodies := map[string]string{"POST /upload": oneValue, "PUT /values": update(`"value":1`), "POST /series": `{"name":"x"}`}
	tooLarge := gzipped(`{"` + strings.Repeat("x", maxBody)) // one long name: it is read the fastest
	for operation, spec := range d.operations {
		if spec["security"] != nil {
			continue
		}
		body := bodies[operation]
		d.try(s, 401, operation, "", body)
		d.try(s, 403, operation+"?tenant_id="+tenantB, key, body)
		d.try(s, 422, operation+"?nope=1", key, body)
		d.try(bug, 500, operation, "", body)
		d.try(down, 503, operation, "", body)
		if body != "" {
			d.try(s, 403, operation, strings.TrimSpace(readOnly), body)
			d.try(s, 413, operation, key, tooLarge, "Content-Encoding: gzip")
			d.try(s, 415, operation, key, body, "Content-Type: text/plain")
			raw(hasty, operation, operation+" HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
		}
	}
	for operation, spec := range d.operations {
		method, path, _ := strings.Cut(operation, " ")
		for tries := 0; spec["security"] == nil && tries < 3*failureBurst && !d.seen[operation+" 429 application/json"]; tries++ {
			resp, text, err := s.do(method, path, "x", "")
			if err != nil {
				t.Fatal(err)
			}
			d.check(operation, resp, text)
		}
		for status, answer := range d.at(spec, "responses") {
			for kind := range d.at(answer, "content") {
				if !d.seen[operation+" "+status+" "+kind] {
					t.Errorf("%s is said to answer %s with %s, which it never did", operation, status, kind)
				}
			}
		}
	}
}

// examples calls fn with each example and default under a node, and with its schema.
func (d *document) examples(node any, fn func(schema object, example any)) {
	members, _ := node.(object)
	elements, _ := node.([]any)
	list, _ := members["examples"].([]any) // of a schema itself
	if standard, given := members["default"]; given {
		list = append(list, standard)
	}
	for _, example := range list {
		fn(members, example)
	}
	if schema := d.at(members["schema"]); len(schema) > 0 { // of a parameter, a header or a body
		if example, given := members["example"]; given || len(d.at(members, "examples")) == 0 {
			fn(schema, example)
		}
		for _, example := range d.at(members, "examples") {
			fn(schema, d.at(example)["value"])
		}
	}
	for _, child := range slices.AppendSeq(elements, maps.Values(members)) {
		d.examples(child, fn)
	}
}

func TestExamplesOfTheDocumentFitTheirSchemas(t *testing.T) {
	d, count := mustDocument(t), 0
	d.examples(d.root, func(schema object, example any) {
		count++
		if err := d.broken(schema, example); err != nil {
			t.Errorf("the example %.200v does not fit its schema: %v", example, err)
		}
	})
	if count < 80 {
		t.Errorf("only %d examples were found", count)
	}
}

var variesInAnswers = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f-]{27}|"(change_time|inserted_at|value_id)":[^,}]*`)

// essence is what must be the same in two answers to one request: no ids, no times of writing. The rest is in parts, sorted,
// because members may be in any order.
func essence(answer any) []string {
	constant := variesInAnswers.ReplaceAllString(asJSON(answer), "")
	parts := strings.FieldsFunc(constant, func(r rune) bool { return strings.ContainsRune("{},", r) })
	slices.Sort(parts)
	return parts
}

// The examples of requests are sent in the order in which they stand, as a reader of the docs page would; then the reads
// again, because the answers that are shown are those after all writes. x-query tells the parameters.
func TestExamplesOfTheDocumentAreAnsweredAsItShows(t *testing.T) {
	t.Parallel()
	d, s := mustDocument(t), mustServer(t)
	key := s.mustUser(t, "3b241101-e2bb-4255-8caf-4136c566a962", "anna@example.com")
	type sending struct {
		request, kind, name string
		example, shown      object
	}
	var writes, reads []sending
	for request, spec := range d.operations {
		answers := d.at(spec, "responses", "200", "content")
		for kind, content := range d.at(spec, "requestBody", "content") {
			for name, example := range d.at(content, "examples") {
				writes = append(writes, sending{request, kind, name, d.at(example), d.at(answers, "application/json", "examples", name)})
			}
		}
		for kind, content := range answers {
			for name, example := range d.at(content, "examples") {
				if strings.HasPrefix(request, "GET ") {
					reads = append(reads, sending{request, kind, name, object{"x-query": d.at(example)["x-query"]}, d.at(example)})
				}
			}
		}
	}
	place := func(x sending) int { return strings.Index(d.text, strconv.Quote(x.name)+":") }
	all := append(writes, reads...)
	slices.SortFunc(all, func(x, y sending) int { return cmp.Compare(place(x), place(y)) })
	for i, x := range append(all, reads...) {
		query, body := url.Values{}, ""
		for name, value := range d.at(x.example, "x-query") {
			query.Set(name, value.(string))
		}
		switch value := x.example["value"].(type) {
		case string:
			body = value // CSV
		case object:
			body = asJSON(value)
		}
		text := d.try(s, 200, x.request+"?"+query.Encode(), key, body, "Content-Type: "+x.kind)
		var answer any = text
		_ = json.Unmarshal([]byte(text), &answer) // or it is CSV
		if (body != "" || i >= len(all)) && !slices.Equal(essence(answer), essence(x.shown["value"])) {
			t.Errorf("%s?%s %s: %s\nthe document shows %v", x.request, query.Encode(), body, text, x.shown["value"])
		}
	}
	if len(writes) < 6 || len(reads) < 6 {
		t.Errorf("only %d writes and %d reads were found", len(writes), len(reads))
	}
}

// The server names what it takes when it refuses a parameter, a field or a column that it does not know.
func TestDocumentNamesTheParametersAndFieldsThatThereAre(t *testing.T) {
	t.Parallel()
	d, s := mustDocument(t), mustServer(t)
	key := s.mustUser(t, tenantA, "a@example.com")
	for _, c := range []struct{ request, body, kind, schema string }{ // without a schema it is about parameters
		{"GET /values?nope=1", "", "", ""}, {"GET /runs?nope=1", "", "", ""}, {"GET /list_timeseries?nope=1", "", "", ""},
		{"POST /upload?nope=1", "x", "text/csv", ""}, {"PUT /values?nope=1", `{"updates":[]}`, "", ""},
		{"POST /series?nope=1", `{"name":"x"}`, "", ""}, {"POST /upload", `{"nope":1}`, "", "Upload"},
		{"POST /upload?run_start_time=2025-01-01", "nope", "text/csv", "UploadRow"}, {"PUT /values", `{"nope":1}`, "", "Updates"},
		{"PUT /values", `{"updates":[{"nope":1}]}`, "", "Update"}, {"POST /series", `{"nope":1}`, "", "NewSeries"},
	} {
		text := d.try(s, 422, c.request, key, c.body, "Content-Type: "+cmp.Or(c.kind, "application/json"))
		_, taken, _ := strings.Cut(strings.ReplaceAll(text, "also ", ""), "there are ")
		operation, _, _ := strings.Cut(c.request, "?")
		names := slices.Collect(maps.Keys(d.at(d.root, "components", "schemas", c.schema, "properties")))
		parameters, _ := d.operations[operation]["parameters"].([]any)
		for _, p := range parameters {
			if p := d.at(p); c.schema == "" && p["in"] == "query" {
				names = append(names, p["name"].(string))
			}
		}
		slices.Sort(names)
		if described := strings.Join(names, ", "); described+"\"}\n" != taken {
			t.Errorf("%s %s: the document names %s\nthe server takes %s", c.request, c.schema, described, taken)
		}
	}
}

// uploadBodies are rows as the notebooks' pandas writes them: ten series, one after the other, in quarters of an hour.
func uploadBodies(rows int) (asJSON, asCSV string) {
	var list []string
	csv := []byte("valid_time,value_key,value\n")
	for i := range rows {
		at := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC).Add(time.Duration(i%(rows/10)) * 15 * time.Minute)
		key, value := fmt.Sprintf("series_%d", i/(rows/10)), 80+float64(i*7919%40_000)/1000
		list = append(list, fmt.Sprintf(`{"valid_time":%q,"value_key":%q,"value":%g}`, at.Format("2006-01-02T15:04:05+00:00"), key, value))
		csv = fmt.Appendf(csv, "%s,%s,%g\n", at.Format("2006-01-02 15:04:05+00:00"), key, value)
	}
	return runWith("", list...), string(csv)
}

func benchmarkUpload(b *testing.B, rows int, path, body string, header ...string) {
	s := mustServer(b)
	key := s.mustUser(b, tenantA, "a@example.com")
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		s.must(b, 200, "POST", path, key, body, header...)
	}
	b.ReportMetric(float64(rows*b.N)/b.Elapsed().Seconds(), "values/s")
}

func BenchmarkUploadJSON(b *testing.B) {
	body, _ := uploadBodies(100_000)
	benchmarkUpload(b, 100_000, "/upload", body)
}

func BenchmarkUploadCSV(b *testing.B) {
	_, body := uploadBodies(100_000)
	benchmarkUpload(b, 100_000, "/upload?run_start_time=2025-01-01", body, "Content-Type: text/csv")
}

// BenchmarkUploadSensors uploads one value of each of a thousand series.
func BenchmarkUploadSensors(b *testing.B) {
	body := []byte("valid_time,value_key,value\n")
	for i := range 1000 {
		body = fmt.Appendf(body, "2025-01-01 00:00:00+00:00,sensor_%d,%d.5\n", i, i)
	}
	benchmarkUpload(b, 1000, "/upload?run_start_time=2025-01-01", string(body), "Content-Type: text/csv")
}

func BenchmarkReadFlat1M(b *testing.B) {
	s := mustServer(b)
	key := s.mustUser(b, tenantA, "a@example.com")
	const n = 1_000_000
	mustManyValues(b, s, key, n)
	benchmarkRead(b, s, key, n)
}

// BenchmarkReadRevisions reads the latest of hourly forecasts, each of a week ahead in quarters of an hour.
func BenchmarkReadRevisions(b *testing.B) {
	s := mustServer(b)
	key := s.mustUser(b, tenantA, "a@example.com")
	const series, runs, values = 20, 168, 672
	begin := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	for run := range runs {
		known := begin.Add(time.Duration(run) * time.Hour)
		text := fmt.Appendf(nil, `{"run_start_time":%[1]q,"known_time":%[1]q,"value_rows":[`, known.Format(time.RFC3339))
		for i := range series * values {
			text = fmt.Appendf(text, `{"value_key":"load%d","valid_time":%q,"value":%d.5},`, i/values,
				known.Add(time.Duration(i%values)*15*time.Minute).Format(time.RFC3339), run)
		}
		s.must(b, 200, "POST", "/upload", key, string(text[:len(text)-1])+"]}")
	}
	benchmarkRead(b, s, key, series*runs*values)
}

// benchmarkRead reads all that there is, which considers n stored values.
func benchmarkRead(b *testing.B, s *testServer, key string, n int) {
	b.ReportAllocs()
	for b.Loop() {
		r, _ := http.NewRequest("GET", s.url+"/values", nil)
		r.Header.Set("X-API-Key", key)
		r.Header.Set("Accept-Encoding", "identity")
		resp, err := s.client.Do(r)
		if err != nil || resp.StatusCode != 200 {
			b.Fatal(resp, err)
		}
		size, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(size)
	}
	b.ReportMetric(float64(n*b.N)/b.Elapsed().Seconds(), "values/s")
}

func BenchmarkSmallRead(b *testing.B) {
	s := mustServer(b)
	key := s.mustUser(b, tenantA, "a@example.com")
	mustManyValues(b, s, key, 100_000)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			resp, _, err := s.do("GET", "/values?series_key=load&start_valid=2020-02-01T00:00:00Z&end_valid=2020-02-01T01:00:00Z", key, "")
			if err != nil || resp.StatusCode != 200 {
				b.Error(resp, err)
			}
		}
	})
}

func FuzzUploadCSV(f *testing.F) {
	for _, seed := range []string{"valid_time,value_key,value\n2025-01-01,load,1\n2025-01-02,load,\n", "value,series_id,valid_time\n",
		"valid_time,value_key,value,valid_time_end\r\n\"2025-01-01 00:00\",\"a\"\"b\",NaN,2025-01-02\r\n", "valid_time,value\n1\n", "\"", ""} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		u := &upload{points: map[seriesRef][]point{}}
		err := u.decodeCSV(bytes.NewReader(body))
		if err == nil {
			if all, err := csv.NewReader(bytes.NewReader(body)).ReadAll(); err != nil || len(all) != u.rows+1 {
				t.Fatalf("%d rows of %q, encoding/csv finds %d lines: %v", u.rows, body, len(all), err)
			}
		} else if refused, ok := errors.AsType[*apiError](err); !ok || refused.status != 422 {
			t.Errorf("%q: %v, want a refusal with 422", body, err)
		}
	})
}

func FuzzUpdates(f *testing.F) {
	for _, seed := range []string{`{"valid_time":"2025-01-01","series_key":"a","value":1}`, `{"valid_time":"2025-01-01","series_id":null,"tags":["B","a "]}`,
		`{"value":null,"value":1}`, `{"valid_time":"2025-01-01T00:00Z","valid_time_end":null,"series_key":"x","annotation":" y "}`, `{"Value":1}`, `[]`, `{`} {
		f.Add([]byte(`{"updates":[` + seed + `]}`))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var updates []map[string]any
		err := fields{"updates": list(func(decode func(into any) error) error {
			var text rawJSON
			if err := decode(&text); err != nil {
				return err
			}
			ref, update, err := decodeUpdate(Caller{tenant: tenantA}, text)
			if err == nil && (ref == seriesRef{} || update["valid_time"] == nil || len(update) < 3) {
				t.Errorf("%q is read as %v %v", body, ref, update)
			}
			updates = append(updates, update)
			return err
		})}.decodeJSON(bytes.NewReader(body))
		if err == nil {
			asJSON(updates) // must not panic
		} else if refused, ok := errors.AsType[*apiError](err); !ok || refused.status != 422 && refused.status != 403 {
			t.Errorf("%q: %v, want a refusal", body, err)
		}
	})
}

// decodeUpload decodes the body of an upload as POST /upload does, without a database.
func decodeUpload(body []byte) (*upload, error) {
	u := &upload{points: map[seriesRef][]point{}}
	err := fields{"run_id": &u.runID, "run_start_time": &u.start, "known_time": &u.known, "run_params": &u.params,
		"series_descriptions": &u.descriptions, "value_rows": list(u.add)}.decodeJSON(bytes.NewReader(body))
	return u, err
}

func FuzzUploadJSON(f *testing.F) {
	params := runWith(`"run_params":{"a":[{}]},`, at("2025-01-01", "null"))
	for _, seed := range []string{emptyRun, oneValue, params, `{"value_rows":[{},]}`, `{} {`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		u, err := decodeUpload(body)
		if err == nil {
			var plain struct {
				Rows []json.RawMessage `json:"value_rows"`
			}
			if err := json.Unmarshal(body, &plain); err != nil || len(plain.Rows) != u.rows {
				t.Fatalf("%d rows of %q, encoding/json finds %d: %v", u.rows, body, len(plain.Rows), err)
			}
			err = u.check()
		}
		var refused *apiError
		if err != nil && (!errors.As(err, &refused) || refused.status != 422) {
			t.Errorf("%q: %v, want a refusal with 422", body, err)
		}
	})
}
