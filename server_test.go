package main

// The tests drive timedb as its users do: through run, which is the command line, and through HTTP, on a real
// PostgreSQL. They use SQL to look at what was stored and to break things. Each test has a database of its own, and
// the API runs under a role that has only what `create tables --app-role` grants.
//
// The tests of each source file stand beside it:
//
//	cli_test.go     the command line
//	auth_test.go    keys, tenancy, and what can be read off the source
//	store_test.go   what is stored and shown, against a naive model
//	faults_test.go  what timedb runs on breaks; script/faults runs these for longer
//	server_test.go  this file: the harness of all tests, then HTTP
//
// This file in order: the harness, routes and the page, limits and slow clients, uploads, reads, openapi.json,
// README.md and docs/, benchmarks, fuzzing.

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"database/sql"
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
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
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

var (
	faults = flag.Int("faults", 1,
		"how many times as long each TestFault runs; script/faults has it run 20 times as long")
	histories = flag.Int("histories", 400, "how many random histories TestReadsAgreeWithNaiveModel checks")
)

// ---- Harness: a database for each test

// appRole is the role that the API runs under. There is one for the whole process, because roles belong to the
// cluster, not to a database.
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
		dropShared()
	}
}

// dropShared drops what the tests of the whole process shared.
func dropShared() {
	db, err := sql.Open("postgres", databaseURL("", nil))
	if err != nil {
		return
	}
	defer db.Close()
	if withTables.name != "" {
		_, err = db.Exec("DROP DATABASE IF EXISTS " + withTables.name + " WITH (FORCE)")
	}
	if err == nil {
		_, err = db.Exec("DROP ROLE IF EXISTS " + appRole.name)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "the tests' role or template is left over:", err)
	}
}

// databaseURL is TEST_DATABASE_URL with another database and another user. An empty one stays as it is.
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
		q.Set("sslmode", "disable") // lib/pq itself would require TLS
	}
	u.RawQuery = q.Encode()
	return u.String()
}

// mustDatabase creates an empty database for this test and returns its URL, as its owner.
func mustDatabase(t testing.TB) string {
	t.Helper()
	return mustCopy(t, "template1")
}

// withTables is a database as create tables --with-users leaves an empty one. Copying it takes less than making one.
var withTables struct {
	once sync.Once
	name string
}

// mustDatabaseWithTables creates a database with timedb's tables for this test and returns its URL, as its owner.
func mustDatabaseWithTables(t testing.TB) string {
	t.Helper()
	if onCitus() { // which has nodes
		dsn := mustDatabase(t)
		mustCreateTables(t, dsn, "--with-users")
		return dsn
	}
	withTables.once.Do(func() {
		admin := mustOpen(t, databaseURL("", nil))
		mustAppRole(t, admin)
		withTables.name = fmt.Sprintf("timedb_test_%016x", rand.Uint64())
		mustExec(t, admin, "CREATE DATABASE "+withTables.name)
		mustCreateTables(t, databaseURL(withTables.name, nil), "--with-users")
	})
	return mustCopy(t, withTables.name)
}

// mustCopy creates a copy of a database for this test and returns its URL, as its owner.
func mustCopy(t testing.TB, original string) string {
	t.Helper()
	if os.Getenv("TEST_DATABASE_URL") == "" {
		t.Fatal("TEST_DATABASE_URL is not set: run script/test, which starts a private PostgreSQL and sets it")
	}
	admin := mustOpen(t, databaseURL("", nil))
	name := fmt.Sprintf("timedb_test_%016x", rand.Uint64())
	mustExec(t, admin, "CREATE DATABASE "+name+" TEMPLATE "+original)
	t.Cleanup(func() {
		if found := secretsIn(t, databaseURL(name, nil)); found != "" { // S6
			t.Errorf("a dump of the database holds %s", found)
		}
		mustDrop(t, admin, name)
	})
	mustSpread(t, name)
	if !onCitus() {
		mustExec(t, admin, "ALTER DATABASE "+name+" SET synchronous_commit = off") // nobody needs this data tomorrow
	}
	mustAppRole(t, admin)
	return databaseURL(name, nil)
}

func mustAppRole(t testing.TB, admin *sql.DB) {
	t.Helper()
	appRole.once.Do(func() {
		appRole.name = fmt.Sprintf("timedb_test_app_%016x", rand.Uint64())
		appRole.password = fmt.Sprintf("app-password-%x", rand.Uint64())
		if onCitus() { // its nodes know one password
			appRole.password, _ = mustParse(t, databaseURL("", nil)).User.Password()
		}
		mustExec(t, admin, "CREATE ROLE "+appRole.name+" LOGIN PASSWORD '"+appRole.password+"'")
	})
}

// mustDrop drops a database. A worker of Citus may have connected to it again meanwhile.
func mustDrop(t testing.TB, admin *sql.DB, name string) {
	t.Helper()
	var err error
	for range 10 {
		_, err = admin.Exec("DROP DATABASE IF EXISTS " + name + " WITH (FORCE)")
		if err == nil {
			return
		}
	}
	t.Error(err)
}

// ---- Harness: Citus, on which script/citus runs tests that run on plain PostgreSQL too

// citusFolder is where script/citus keeps its nodes, "" if the tests run on plain PostgreSQL.
var citusFolder = os.Getenv("TEST_CITUS")

func onCitus() bool { return citusFolder != "" }

// citusPort is the port of a node: coordinator, worker1 or worker2.
func citusPort(t testing.TB, node string) string {
	t.Helper()
	conf, err := os.ReadFile(filepath.Join(citusFolder, node, "postgresql.conf"))
	if err != nil {
		t.Fatal(err)
	}
	return string(regexp.MustCompile(`(?m)^port = (\d+)`).FindSubmatch(conf)[1])
}

// citusURL is the URL of a database of a node.
func citusURL(t testing.TB, node, database string) string {
	t.Helper()
	u := mustParse(t, databaseURL(database, nil))
	u.Host = "127.0.0.1:" + citusPort(t, node)
	return u.String()
}

var citusWorkers = []string{"worker1", "worker2"}

// mustSpread makes a database of the coordinator one of Citus, with the workers; on plain PostgreSQL it does nothing.
func mustSpread(t testing.TB, name string) {
	t.Helper()
	if !onCitus() {
		return
	}
	db := mustOpen(t, databaseURL(name, nil))
	mustExec(t, db, "CREATE EXTENSION citus")
	mustExec(t, db, "SELECT citus_set_coordinator_host('127.0.0.1', $1)", citusPort(t, "coordinator"))
	for _, worker := range citusWorkers {
		admin := mustOpen(t, citusURL(t, worker, ""))
		mustExec(t, admin, "CREATE DATABASE "+name)
		t.Cleanup(func() { mustDrop(t, admin, name) })
		mustExec(t, mustOpen(t, citusURL(t, worker, name)), "CREATE EXTENSION citus")
		waitUntil(t, worker+" is added", func() bool { // two at once may fail, because roles belong to all databases
			_, err := db.Exec("SELECT citus_add_node('127.0.0.1', $1)", citusPort(t, worker))
			return err == nil
		})
	}
}

// secretsIn looks for whole keys and for passwords in a dump of the database, and says what it found.
func secretsIn(t testing.TB, dsn string) string {
	t.Helper()
	dump, err := exec.Command("pg_dump", dsn).Output()
	failed, ok := errors.AsType[*exec.ExitError](err)
	if ok && bytes.Contains(failed.Stderr, []byte("does not exist")) {
		return "" // the test has dropped its database
	}
	if err != nil {
		t.Fatalf("pg_dump (of Debian's package postgresql): %v", err)
	}
	password, _ := mustParse(t, dsn).User.Password()
	return secretsOf(string(dump), password)
}

var wholeKey = regexp.MustCompile(`tdb_[a-zA-Z0-9]{8}_[A-Za-z0-9_-]{40}`)

// secretsOf says whether text holds a whole key, the given password or the password of the API's role.
func secretsOf(text, password string) string {
	if wholeKey.MatchString(text) {
		return "a key"
	}
	for _, secret := range []string{password, appRole.password} {
		if secret != "" && strings.Contains(text, secret) {
			return "a password"
		}
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

// asAppRole is the DSN of the same database for the API's role.
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

// ---- Harness: the command line

// runIn runs one command line with an environment and standard input.
func runIn(env map[string]string, stdin string, args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	getenv := func(name string) string { return env[name] }
	creates := len(args) > 1 && args[0] == "create" && args[1] == "tables" && !slices.Contains(args, "--dry-run")
	coordinator, _ := url.Parse(databaseURL("", nil))
	if onCitus() && creates && strings.Contains(env["TIMEDB_DSN"], coordinator.Host) {
		args = append(slices.Clone(args), "--citus")
	}
	code = run(context.Background(), args, getenv, strings.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

// mustRun runs a command line on dsn and returns what it printed. Its exit code must be want.
func mustRun(t testing.TB, want int, dsn, stdin string, args ...string) (stdout, stderr string) {
	t.Helper()
	code, stdout, stderr := runIn(map[string]string{"TIMEDB_DSN": dsn}, stdin, args...)
	if code != want {
		t.Fatalf("timedb %s: exit %d, want %d\nstdout: %s\nstderr: %s",
			strings.Join(args, " "), code, want, stdout, stderr)
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

// ---- Harness: the API

// logBuffer keeps what a server writes to stdout or stderr. It can be read while the server runs.
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
	stop     func() int // asks the server to stop, waits until it has ended and returns the exit code
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
	env := map[string]string{"TIMEDB_DSN": serving}
	getenv := func(name string) string { return env[name] }
	out, done := &logBuffer{}, make(chan struct{})
	code := -1
	port := strconv.Itoa(freePort(t))
	go func() {
		defer close(done)
		code = run(ctx, append([]string{"api", "--port", port}, args...), getenv, strings.NewReader(""), out, s.log)
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
	waitUntil(t, "the API says where it serves", func() bool {
		found := servesLine.FindStringSubmatch(out.String())
		if found != nil {
			s.url = found[1]
			return true
		}
		select {
		case <-done:
			t.Fatalf("timedb api ended with exit %d: %s", code, s.log)
		default:
		}
		return false
	})
	return s
}

// mustServer starts the API on a database of its own that has users_table.
func mustServer(t testing.TB, args ...string) *testServer {
	t.Helper()
	return mustAPI(t, mustDatabaseWithTables(t), args...)
}

// mustUser creates a user on the command line and returns the key.
func (s *testServer) mustUser(t testing.TB, tenant, email string) string {
	t.Helper()
	key, _ := mustRun(t, 0, s.dsn, "", "users", "create", "-q", "-t", tenant, "-e", email)
	return strings.TrimSpace(key)
}

// do sends one request. Header lines are "Name: value". A body without a Content-Type is sent as JSON. Nothing is
// retried.
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
		switch name {
		case "Host":
			r.Host = value
		case "X-API-Key":
			r.Header.Add(name, value) // beside the key that was given
		default:
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

// must sends one request and returns the body of the answer. Its status must be want.
func (s *testServer) must(t testing.TB, want int, method, path, key, body string, header ...string) string {
	t.Helper()
	resp, text, err := s.do(method, path, key, body, header...)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	if resp.StatusCode != want {
		t.Fatalf("%s %s: status %d, want %d: %s\nrequest: %.2000s", method, path, resp.StatusCode, want, text, body)
	}
	if want < 400 || method == "HEAD" {
		return text
	}
	var refusal struct{ Detail string }
	err = json.Unmarshal([]byte(text), &refusal)
	if err != nil || refusal.Detail == "" {
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

// waitUntil returns as soon as the condition holds. It ends the test if that takes more than two minutes.
func waitUntil(t testing.TB, condition string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after two minutes it is still not so that %s", condition)
		}
	}
}

// mustDial opens a bare connection to the server; the end of the test closes it. Its buffer for reading is small, so
// that the server soon notices a client that does not read.
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

// requestCase is one request with the status of its answer and the texts that the answer's body must contain.
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
			expectIn(t, fmt.Sprintf("%s %s %.300s", c.method, c.path, c.body), text, c.want...)
		})
	}
}

// expectIn reports each text that the answer to a request lacks.
func expectIn(t *testing.T, request, answer string, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(answer, text) {
			t.Errorf("%s: %q, want %q in it", request, answer, text)
		}
	}
}

// mustRaw sends bytes as they are and returns the first line of the answer.
func (s *testServer) mustRaw(t testing.TB, request string) string {
	t.Helper()
	conn := s.mustDial(t)
	defer conn.Close()
	go io.WriteString(conn, request) // the server may answer and close before it has read everything
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

// stored counts what is in the three data tables. A change of it shows that something was stored.
func (s *testServer) stored(t testing.TB) string {
	t.Helper()
	return mustQuery(t, s.db, `SELECT concat_ws(' ',
		(SELECT count(*) FROM runs_table), (SELECT count(*) FROM series_table),
		(SELECT count(*) FROM values_table), (SELECT sum(cardinality("values")) FROM value_blocks))`)
}

// ---- Harness: looking and comparing

// relations lists what is in a schema: tables, views, sequences, indexes and functions.
func relations(t testing.TB, db *sql.DB, schema string) string {
	t.Helper()
	return mustQuery(t, db, `SELECT string_agg(name, ' ' ORDER BY name) FROM (
		SELECT relname::text AS name FROM pg_class WHERE relnamespace = to_regnamespace($1)
		UNION ALL SELECT proname::text FROM pg_proc WHERE pronamespace = to_regnamespace($1)) AS x`,
		pq.QuoteIdentifier(schema))
}

// users is a digest of everything in users_table and keys_table.
func users(t testing.TB, db *sql.DB) string {
	t.Helper()
	return mustQuery(t, db, `SELECT md5(string_agg(u::text || coalesce(k::text, ''), ',' ORDER BY user_id, key_id))
		FROM users_table u LEFT JOIN keys_table k USING (user_id)`)
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

// Minimal uploads.
const (
	emptyRun = `{"run_start_time":"2025-01-01T00:00:00Z","value_rows":[]}`
	oneValue = `{"run_start_time":"2025-01-01T00:00:00Z","known_time":"2025-01-01T00:00:00Z","value_rows":[
		{"valid_time":"2025-01-01T00:00:00Z","value_key":"load","value":1}]}`
)

// ---- Routes and the page

// script/browser sees that browsers enforce the policy, and that the page works under it.
func TestPageIsAFewFilesUnderAStrictPolicy(t *testing.T) {
	t.Parallel()
	const html, css, script = "text/html; charset=utf-8", "text/css; charset=utf-8", "text/javascript; charset=utf-8"
	s := mustServer(t)
	answered := map[string]bool{}
	for _, c := range []struct{ name, kind string }{
		{"/docs", html},
		{"/docs/docs.css", css},
		{"/docs/api.js", script},
		{"/docs/explore.js", script},
		{"/docs/lead.js", script},
		{"/docs/moments.js", script},
		{"/docs/picture.js", script},
		{"/docs/plot.js", script},
		{"/docs/reference.js", script},
		{"/docs/tabs.js", script},
		{"/docs/times.js", script},
		{"/docs/writes.js", script},
	} {
		t.Run(c.name, func(t *testing.T) {
			resp, text, err := s.do("GET", c.name, "", "")
			if err != nil || resp.StatusCode != 200 || resp.Header.Get("Content-Type") != c.kind {
				t.Fatalf("%v, %v, want 200 with %s", resp, err, c.kind)
			}
			answered[strings.TrimPrefix(c.name, "/docs/")] = true
			const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; " +
				"img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
			if got := resp.Header.Get("Content-Security-Policy"); got != policy {
				t.Errorf("the policy is %q", got)
			}
			if resp.Header.Get("X-Content-Type-Options") != "nosniff" {
				t.Error("browsers may guess another type")
			}
			dangerous := regexp.MustCompile(`innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|` +
				`new Function|Storage|\bon[a-z]+="|style="|<style|<script>|https?://`)
			found := dangerous.FindString(strings.ReplaceAll(text, "http://www.w3.org/2000/svg", ""))
			if found != "" {
				t.Errorf("the file has %q", found)
			}
		})
	}
	page := s.must(t, 200, "GET", "/docs", "", "")
	for _, found := range regexp.MustCompile(`"docs/([^"]+)"`).FindAllStringSubmatch(page, -1) {
		if !answered[found[1]] {
			t.Errorf("the page loads %s, which is not answered", found[1])
		}
	}
	files, err := web.ReadDir("web")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		isScript := strings.HasSuffix(file.Name(), ".js")
		if isScript && !answered[file.Name()] {
			t.Errorf("web/%s is not answered", file.Name())
		}
	}
}

func TestPageHasNoOtherFile(t *testing.T) { // S1
	t.Parallel()
	s, key := mustTenant(t)
	for _, name := range []string{
		"/docs/docs.html", "/docs/openapi.json", "/docs/root.json", "/docs/nope.js", "/docs/API.js", "/docs/api.js.map",
		"/docs/%2e%2e%2fserver.go", "/docs/..%2fserver.go", "/docs/api%2ejs%00", "/docs/web%2fapi.js", "/docs/api.js%2f",
	} {
		t.Run(name, func(t *testing.T) {
			resp, body, err := s.do("GET", name, "", "")
			if err != nil || resp.StatusCode != 401 || resp.Header.Get("Content-Type") != "application/json" {
				t.Errorf("%v, %v, %.100s, want 401 in JSON", resp, err, body)
			}
			s.must(t, 404, "GET", name, key, "")
		})
	}
}

func TestKnownPathsAnswerOtherMethodsWithAllow(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	for _, c := range []struct {
		name  string // the path
		allow []string
	}{
		{"/upload", []string{"POST"}},
		{"/values", []string{"GET", "PUT"}},
		{"/series", []string{"POST"}},
		{"/list_timeseries", []string{"GET"}},
		{"/corrections", []string{"GET"}},
		{withdraw(nobody), []string{"POST"}},
		{"/", []string{"GET"}},
		{"/docs", []string{"GET"}},
		{"/docs/api.js", []string{"GET"}},
	} {
		t.Run("DELETE "+c.name, func(t *testing.T) {
			resp, _, err := s.do("DELETE", c.name, key, "")
			if err != nil || resp.StatusCode != 405 {
				t.Fatalf("%v, %v, want 405", resp, err)
			}
			expectIn(t, "Allow", resp.Header.Get("Allow"), c.allow...)
		})
	}
	s.runRequests(t, key, []requestCase{
		{"an unknown path", "GET", "/nope", "", 404, nil},
		{"a path below a known one", "GET", "/values/x", "", 404, nil},
		{"a known path in capitals", "GET", "/VALUES", "", 404, nil},
	})
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
	words := map[access]string{
		open:   "open",
		reads:  "needs an API key",
		writes: "needs an API key that may write",
	}
	endpoints := map[string]any{}
	for _, rt := range (&server{}).routes() {
		endpoints[strings.TrimSuffix(rt.pattern, "{$}")] = words[rt.access]
	}
	if !reflect.DeepEqual(root["endpoints"], any(endpoints)) {
		t.Errorf("GET / tells of the routes %v; they are %v", root["endpoints"], endpoints)
	}
	if root["version"] != release {
		t.Errorf("GET / tells of version %v; it is %s", root["version"], release)
	}
	how, _ := root["authentication"].(map[string]any)
	if how["header"] != "X-API-Key" || how["method"] == nil || how["note"] == nil {
		t.Errorf("authentication is %v", how)
	}
	health := s.must(t, 200, "GET", "/healthz", "", "")
	if strings.TrimSpace(health) != `{"status":"ok"}` {
		t.Errorf("GET /healthz: %q", health)
	}
}

// noUsers is a keyStore of a database without users_table, or one that fails.
type noUsers struct {
	keyStore // nil: no key is ever looked up
	failure  error
}

func (n noUsers) UsersTableExists(context.Context) (bool, error) { return false, n.failure }

// serverWithoutDatabase is the HTTP server with no store behind it: a handler that needs the store panics. The
// question whether users_table exists ends with failure; without one the answer is no, so no key is needed. A client
// has as long as patience to send its request; 0 is no limit.
func serverWithoutDatabase(t *testing.T, failure error, patience time.Duration, log io.Writer) *testServer {
	t.Helper()
	keys := noUsers{failure: failure}
	auth := &authenticator{keys: keys}
	handler := newServer(nil, keys, auth, slog.New(slog.NewTextHandler(log, nil)))
	hs := httptest.NewUnstartedServer(handler)
	hs.Config.ReadTimeout = patience
	hs.Start()
	t.Cleanup(hs.Close)
	return &testServer{url: hs.URL, client: hs.Client()}
}

func TestBugIsA500ThatExplainsNothing(t *testing.T) { // S11, S25
	var log logBuffer
	s := serverWithoutDatabase(t, nil, 0, &log)
	resp, body, err := s.do("GET", "/list_timeseries", "", "")
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 500 || body != `{"detail":"Internal server error."}`+"\n" {
		t.Errorf("a panic is answered %v %q", resp, body)
	}
	if !strings.Contains(log.String(), "nil pointer") {
		t.Errorf("the log does not tell of the panic: %q", log.String())
	}
}

// ---- Limits and slow clients

func TestURLsOver64KiBAndHeadersOver16KiBAreRefused(t *testing.T) { // S21
	t.Parallel()
	s := mustServer(t)
	const host = "Host: x\r\n"
	for _, c := range []struct {
		name         string
		url, headers int // bytes
		want         string
	}{
		// What is read is found to have no key.
		{"a URL of 64 KiB", 64 << 10, 100, " 401 "},
		{"headers of 16 KiB", 100, 16 << 10, " 401 "},
		{"a URL of 64 KiB and headers of 16 KiB", 64 << 10, 16 << 10, " 401 "},
		{"a URL of a byte more", 64<<10 + 1, 100, " 414 "},
		{"a URL of 80 KiB", 80 << 10, 100, " 414 "},
		{"headers of some bytes more", 100, 16<<10 + 10, " 431 "},
		{"headers of 80 KiB", 100, 80 << 10, " 431 "},
		{"headers of 200 KiB", 100, 200 << 10, " 431 "},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := "/values?series_key="
			path += strings.Repeat("k", c.url-len(path))
			const name = "X-Padding: "
			padding := strings.Repeat("p", c.headers-len(host+name+"\r\n"))
			line := s.mustRaw(t, "GET "+path+" HTTP/1.1\r\n"+host+name+padding+"\r\n\r\n")
			if !strings.Contains(line, c.want) {
				t.Errorf("%q, want %s", line, c.want)
			}
		})
	}
	t.Run("400 keys", func(t *testing.T) {
		key := s.mustUser(t, tenantA, "a@example.com")
		query := url.Values{}
		var rows []string
		for i := range 400 {
			series := fmt.Sprintf("%03d %s", i, strings.Repeat("k", 100))
			rows = append(rows, seriesRow(series, "2025-01-01", "1"))
			query.Add("series_key", series)
		}
		s.must(t, 200, "POST", "/upload", key, runWith("", rows...))
		text := s.must(t, 200, "GET", "/values?"+query.Encode(), key, "")
		if got := mustDecode[readAnswer](t, text); got.Count != 400 {
			t.Errorf("%d rows", got.Count)
		}
	})
	t.Run("the log is not as long as the URL", func(t *testing.T) {
		s.must(t, 401, "GET", "/"+strings.Repeat("x", 60_000), "", "")
		if strings.Contains(s.log.String(), strings.Repeat("x", 1000)) {
			t.Error("the log repeats a long path")
		}
	})
}

// rawGet is a GET request as bytes, for mustDial.
func rawGet(path, key string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: x\r\nX-API-Key: " + key + "\r\n\r\n"
}

func TestSlowReaderIsCutOff(t *testing.T) { // S20
	t.Parallel()
	s, key := mustTenant(t)
	mustManyValues(t, s, key, 250_000)
	conn := s.mustDial(t)
	io.WriteString(conn, rawGet("/values", key))
	waitUntil(t, "a client that does not read its answer is cut off", func() bool {
		return strings.Contains(s.log.String(), "broken=true")
	})
}

// answerOf sends a request and returns the status and the body of the answer. A 503 must tell when to come again.
func (s *testServer) answerOf(t *testing.T, method, path, key, body string, header ...string) string {
	t.Helper()
	resp, text, err := s.do(method, path, key, body, header...)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	if resp.StatusCode == 503 && resp.Header.Get("Retry-After") == "" {
		t.Errorf("%s %s: 503 without Retry-After", method, path)
	}
	return fmt.Sprintf("%d %s", resp.StatusCode, text)
}

func TestUploadOfTooManySeriesIs422AndStoresNothing(t *testing.T) { // S23
	t.Parallel()
	s, key := mustTenant(t)
	body := []byte("valid_time,value_key,value\n")
	for i := range maxSeries + 1 {
		body = fmt.Appendf(body, "2025-01-01,%d,1\n", i)
	}
	const path = "/upload?run_start_time=2025-01-01"
	answer := s.must(t, 422, "POST", path, key, string(body), "Content-Type: text/csv")
	want := fmt.Sprintf("line[%d].series: expected at most 100000 in one upload", maxSeries+2)
	expectIn(t, "one series too many", answer, want)
	if n := mustQuery(t, s.db, `SELECT count(*) FROM series_table`); n != "0" {
		t.Errorf("%s series are stored", n)
	}
}

// Each time that encoding/json gets more, it looks again through all the white space that it has. In small pieces
// that is quadratic. A body is therefore handed on in whole pieces, however small the pieces that arrive.
func TestBodyIsHandedOnInWholePieces(t *testing.T) { // S21
	spaces := strings.NewReader(strings.Repeat(" ", 2500))
	r := httptest.NewRequest("POST", "/upload", iotest.OneByteReader(spaces))
	r.Header.Set("Content-Type", "text/csv")
	b, err := openBody(&response{rw: httptest.NewRecorder(), memory: ampleClaim()}, r, "text/csv")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{1000, 1000, 500, 0} {
		n, err := b.Read(make([]byte, 1000))
		if n != want || (err == io.EOF) != (n == 0) {
			t.Errorf("%d bytes and %v, want %d", n, err, want)
		}
	}
}

// A client that is still sending when its body is refused must get the answer, not a broken connection.
func TestRefusalReachesAClientThatIsStillSending(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	rows := strings.Repeat(at("2025-01-01", "1")+",", 300_000)
	body := runWith("", at("never", "1"), strings.TrimSuffix(rows, ","))
	conn := s.mustDial(t)
	fmt.Fprintf(conn, "POST /upload HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Type: application/json\r\n"+
		"Content-Length: %d\r\n\r\n", key, len(body))
	if _, err := io.WriteString(conn, body); err != nil {
		t.Errorf("while sending: %v", err)
	}
	answer := make([]byte, 12)
	if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != "HTTP/1.1 422" {
		t.Errorf("%q %v", answer, err)
	}
}

// An answer that nobody reads holds a place of its own tenant, and of no other.
func TestClientsThatDoNotReadKeepNobodyWaiting(t *testing.T) { // S20, S33
	t.Parallel()
	s, key := mustTenant(t)
	neighbour := s.mustUser(t, tenantB, "b@example.com")
	mustExec(t, s.db, `INSERT INTO series_table (tenant_id, series_key, unit)
		SELECT $1, repeat('long ', 80) || i, 'MW' FROM generate_series(1, 40000) AS i`, tenantA)
	for range tenantPlaces {
		conn := s.mustDial(t)
		io.WriteString(conn, rawGet("/list_timeseries", key))
		if _, err := io.ReadFull(conn, make([]byte, 16)); err != nil { // the answer has begun
			t.Fatal(err)
		}
	}
	s.must(t, 503, "GET", "/values?limit=1", key, "")
	s.must(t, 200, "GET", "/values?limit=1", neighbour, "")
}

func TestConnectionsBeyondTheLimitAreRefused(t *testing.T) { // S20
	const limit = 3
	hs := httptest.NewUnstartedServer(http.NotFoundHandler())
	hs.Config.ConnState = refuseBeyond(limit)
	hs.Start()
	defer hs.Close()
	s := &testServer{url: hs.URL}
	const begin, end = "GET / HTTP/1.1\r\n", "Host: x\r\n\r\n"
	answers := func(conn net.Conn) bool { // a connection that is refused ends without a byte
		io.WriteString(conn, end)
		n, _ := conn.Read(make([]byte, 1000))
		return n > 0
	}
	var held []net.Conn
	for range limit {
		conn := s.mustDial(t)
		io.WriteString(conn, begin)
		held = append(held, conn)
	}
	beyond := s.mustDial(t)
	io.WriteString(beyond, begin)
	if answers(beyond) {
		t.Errorf("connection %d of at most %d is served", limit+1, limit)
	}
	for i, conn := range held {
		if !answers(conn) {
			t.Errorf("connection %d of %d is refused", i+1, limit)
		}
	}
	waitUntil(t, "there is room for another connection, because idle ones are closed", func() bool {
		conn := s.mustDial(t)
		io.WriteString(conn, begin)
		return answers(conn)
	})
}

func TestSlowHeadersKeepNobodyOut(t *testing.T) { // S20
	t.Parallel()
	s, key := mustTenant(t)
	var slow []net.Conn
	for range 1000 {
		conn := s.mustDial(t)
		io.WriteString(conn, "GET /values HTTP/1.1\r\nHost: x\r\nX-Slow: ")
		slow = append(slow, conn)
	}
	for range 20 {
		s.must(t, 200, "GET", "/list_timeseries", key, "")
	}
	for _, conn := range slow { // readHeaderTimeout must end each of them
		conn.SetReadDeadline(time.Now().Add(10 * readHeaderTimeout))
		if _, err := io.Copy(io.Discard, conn); err != nil {
			t.Fatalf("a connection that never sent its header was kept: %v", err)
		}
	}
}

func TestBodyOfUnknownLengthIsBounded(t *testing.T) { // S21
	t.Parallel()
	s, key := mustTenant(t)
	long := strings.NewReader(strings.Repeat("x", 70<<20))
	body := io.MultiReader(strings.NewReader(`{"workflow_id":"`), long, strings.NewReader(`"}`))
	r, err := http.NewRequest("POST", s.url+"/upload", body) // it cannot know the length of this reader
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
	s, key := mustTenant(t)
	text := s.must(t, 422, "POST", "/series", key, `{"`+strings.Repeat("x", 60<<10)+`":1}`)
	if len(text) > 4<<10 {
		t.Errorf("the refusal is %d bytes long", len(text))
	}
	if size := len(s.log.String()); size > 64<<10 {
		t.Errorf("the log is %d bytes long", size)
	}
}

// ---- Uploads

// uploadAnswer is what POST /upload answers.
type uploadAnswer struct {
	RunID     string            `json:"run_id"`
	Message   string            `json:"message"`
	SeriesIDs map[string]string `json:"series_ids"`
	Rows      int               `json:"rows_inserted"`
}

// mustUpload uploads JSON and returns the answer.
func (s *testServer) mustUpload(t *testing.T, key, body string) uploadAnswer {
	t.Helper()
	return mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload", key, body))
}

// runWith is an upload of the given rows, with more members before them.
func runWith(more string, rows ...string) string {
	return `{"run_start_time":"2025-01-01T00:00:00Z",` + more + `"value_rows":[` + strings.Join(rows, ",") + `]}`
}

// at is a row of the series load.
func at(validTime, value string, more ...string) string {
	return `{"valid_time":"` + validTime + `","value_key":"load","value":` + value + strings.Join(more, "") + `}`
}

// dayAhead is an upload that gives everything that can be given, except a run_id.
const dayAhead = `{"workflow_id":"day-ahead","run_start_time":"2025-01-01 06:00",
	"run_finish_time":"2025-01-01T06:05:00.25+00:00","known_time":"2025-01-01T07:00:00+01:00",
	"run_params":{"model":"v2","n":[1,2.5]},"series_descriptions":{"load":"Load in MW"},
	"tenant_id":"` + tenantA + `","value_rows":[
	{"valid_time":"2025-01-02T01:00:00Z","value_key":"load","value":20},
	{"valid_time":"2025-01-02","value_key":"load","value":null},
	{"valid_time":"2025-01-02T00:00:00Z","valid_time_end":"2025-01-02T01:00:00Z","value_key":"wind","value":-0.5}]}`

func TestUploadAnswersAndStoresTheRun(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	got := s.mustUpload(t, key, dayAhead)
	if got.Message != "Run created successfully" || got.Rows != 3 || len(got.SeriesIDs) != 2 || len(got.RunID) != 36 {
		t.Errorf("POST /upload answers %+v", got)
	}
	expectIn(t, "GET /runs", s.must(t, 200, "GET", "/runs", key, ""),
		`"run_id":"`+got.RunID+`"`, `"workflow_id":"day-ahead"`,
		`"run_start_time":"2025-01-01T06:00:00.000000+00:00"`, `"run_finish_time":"2025-01-01T06:05:00.250000+00:00"`,
		`"known_time":"2025-01-01T06:00:00.000000+00:00"`, `"changed_by":"a@example.com"`, `"rows":3`, `"inserted_at":"20`)

	run := mustQuery(t, s.db, `SELECT concat_ws(' ', run_id, workflow_id, run_start_time AT TIME ZONE 'UTC',
		run_finish_time AT TIME ZONE 'UTC', known_time AT TIME ZONE 'UTC', run_params, rows_inserted, changed_by)
		FROM runs_table`)
	want := got.RunID + ` day-ahead 2025-01-01 06:00:00 2025-01-01 06:05:00.25 2025-01-01 06:00:00 ` +
		`{"model":"v2","n":[1,2.5]} 3 a@example.com`
	if run != want {
		t.Errorf("the run is stored as %s\nwant %s", run, want)
	}

	type entry struct {
		Key         string  `json:"series_key"`
		Description *string `json:"description"`
		Unit        string  `json:"unit"`
	}
	series := mustDecode[map[string]entry](t, s.must(t, 200, "GET", "/list_timeseries", key, ""))
	if len(series) != 2 {
		t.Errorf("GET /list_timeseries: %+v, want two", series)
	}
	load, wind := series[got.SeriesIDs["load"]], series[got.SeriesIDs["wind"]]
	if load.Key != "load" || load.Unit != "dimensionless" {
		t.Errorf("GET /list_timeseries: load is %+v", load)
	}
	if load.Description == nil || *load.Description != "Load in MW" {
		t.Errorf("GET /list_timeseries: load is not described: %+v", load)
	}
	if wind.Description != nil {
		t.Errorf("GET /list_timeseries: wind has the description %q", *wind.Description)
	}
}

// What is stored can't expand: a number of few digits that stands for many stays as it is.
func TestRunParamsComeBackAsTheyWereSent(t *testing.T) { // S35
	t.Parallel()
	s, key := mustTenant(t)
	const params = `{ "n" : [1e131071, 1.50, -0],"a":"\u0000 \ud800 <é>", "a":1 }`
	s.must(t, 200, "POST", "/upload", key, runWith(`"run_params":`+params+`,`))
	expectIn(t, "GET /runs", s.must(t, 200, "GET", "/runs", key, ""), `"run_params":`+params+`,`)
}

func TestUploadIsKnownNowUnlessItSaysOtherwise(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	first := s.mustUpload(t, key, dayAhead)
	before := mustQuery(t, s.db, `SELECT clock_timestamp()`)
	next := s.mustUpload(t, key, runWith("", at("2025-01-02", "1")))
	if next.SeriesIDs["load"] != first.SeriesIDs["load"] {
		t.Error("the same value_key became another series")
	}
	workflow := mustQuery(t, s.db, `SELECT workflow_id FROM runs_table
		WHERE known_time BETWEEN $1 AND clock_timestamp()`, before)
	if workflow != "api-workflow" {
		t.Errorf("the workflow of the run that is known now is %q, want api-workflow", workflow)
	}
}

func TestRunStartsWhenItIsKnownUnlessItSaysOtherwise(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	const header = "valid_time,value_key,value\n"
	for _, c := range []struct{ name, query, kind, body, want string }{
		{"JSON, with known_time", "", "application/json", `{"known_time":"2025-01-02T03:00Z","value_rows":[]}`, "2025-01-02 03:00:00+00"},
		{"CSV, with known_time", "?known_time=2025-01-02T03:00Z", "text/csv", header, "2025-01-02 03:00:00+00"},
		{"both", "", "application/json", `{"known_time":"2025-01-02","run_start_time":"2025-01-01"}`, "2025-01-01 00:00:00+00"},
		{"neither", "", "application/json", `{"run_start_time":null,"value_rows":[]}`, "now"},
		{"neither, and a finish to come", "", "application/json", `{"run_finish_time":"2200-01-01"}`, "now"},
		{"CSV, with neither", "", "text/csv", header, "now"},
	} {
		t.Run(c.name, func(t *testing.T) {
			run := mustDecode[uploadAnswer](t, s.must(t, 200, "POST", "/upload"+c.query, key, c.body, "Content-Type: "+c.kind)).RunID
			got := mustQuery(t, s.db, `SELECT CASE WHEN run_start_time = inserted_at AND known_time = inserted_at THEN 'now'
				ELSE (run_start_time AT TIME ZONE 'UTC')::text || '+00' END FROM runs_table WHERE run_id = $1`, run)
			if got != c.want {
				t.Errorf("it started %s, want %s", got, c.want)
			}
		})
	}
}

func TestBodyWithoutContentTypeIsTakenForJSON(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	for _, c := range []struct{ name, request, body string }{
		{"an upload", "POST /upload", oneValue},
		{"a correction", "PUT /values", update(`"value":2.5`)},
		{"a series", "POST /series", `{"name":"s"}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			line := s.mustRaw(t, fmt.Sprintf("%s HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Length: %d\r\n\r\n%s",
				c.request, key, len(c.body), c.body))
			if line != "HTTP/1.1 200 OK" {
				t.Errorf("it is answered %s", line)
			}
		})
	}
}

func TestUploadThatMayCreateNoSeriesRefusesUnknownKeys(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	other := s.mustUser(t, tenantB, "b@example.com")
	load := s.mustUpload(t, key, oneValue).SeriesIDs["load"]
	s.mustUpload(t, other, runWith("", seriesRow("steam turbine", "2025-01-01", "1")))
	no := func(rows ...string) string { return runWith(`"create_series":false,`, rows...) }
	for _, c := range []struct {
		name, body string
		want       string // of the refusal; "" if there is none
	}{
		{"a known key", no(at("2025-02-01", "1")), ""},
		{"a known key with white space", no(seriesRow(" load ", "2025-02-01", "1")), ""},
		{"a series_id alone", no(`{"valid_time":"2025-02-01","series_id":"` + load + `","value":1}`), ""},
		{"no rows", no(), ""},
		{"a misspelt key", no(goodRow, seriesRow("lod", "2025-02-01", "1")),
			`series_key: there is no series \"lod\"; did you mean \"load\"?`},
		{"a key like none", no(goodRow, seriesRow("wind", "2025-02-01", "1")), `there is no series \"wind\"` + "\"}"},
		{"a key like another tenant's", no(seriesRow("steam turbin", "2025-02-01", "1")), `there is no series \"steam turbin\"` + "\"}"},
		{"a series_id of nobody", no(`{"valid_time":"2025-02-01","series_id":"` + nobody + `","value":1}`), nobody},
	} {
		t.Run("JSON: "+c.name, func(t *testing.T) {
			if c.want == "" {
				s.must(t, 200, "POST", "/upload", key, c.body)
				return
			}
			s.mustRefuseUpload(t, key, "/upload", badUpload{c.name, c.body, 404, c.want})
		})
	}
	const asCSV, lines = "Content-Type: text/csv", "valid_time,series_key,value\n2025-02-01,loud,1\n"
	t.Run("CSV: refused", func(t *testing.T) {
		refused := badUpload{"a misspelt key", lines, 404, `there is no series \"loud\"; did you mean \"load\"?`}
		s.mustRefuseUpload(t, key, "/upload?create_series=false", refused, asCSV)
	})
	t.Run("CSV: created", func(t *testing.T) {
		s.must(t, 200, "POST", "/upload?create_series=true", key, lines, asCSV)
		s.must(t, 200, "POST", "/upload?create_series=false", key, lines, asCSV)
	})
	if n := mustQuery(t, s.db, `SELECT count(*) FROM series_table`); n != "3" {
		t.Errorf("%s series are stored, want load, loud and the other tenant's", n)
	}
}

// What a read answers as CSV is an upload once the columns that no upload has are dropped.
func TestCSVOfAReadCanBeUploaded(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, _ := mustPicture(t, s)
	other := s.mustUser(t, tenantB, "b@example.com")
	const csvRead, asCSV = "/values?format=csv", "Content-Type: text/csv"
	text := s.must(t, 200, "GET", csvRead, key, "")
	expectIn(t, "a read", s.must(t, 422, "POST", "/upload", key, text, asCSV),
		"line[1].series_unit: unknown in the header, to be dropped or renamed")
	without := func(text string, columns ...string) string {
		lines, err := csv.NewReader(strings.NewReader(text)).ReadAll()
		if err != nil {
			t.Fatal(err)
		}
		header := slices.Clone(lines[0])
		var out bytes.Buffer
		w := csv.NewWriter(&out)
		for _, line := range lines {
			var kept []string
			for i, cell := range line {
				if !slices.Contains(columns, header[i]) {
					kept = append(kept, cell)
				}
			}
			w.Write(kept)
		}
		w.Flush()
		return out.String()
	}
	t.Run("by its tenant", func(t *testing.T) {
		s.must(t, 200, "POST", "/upload", key, without(text, "series_unit"), asCSV)
		if again := s.must(t, 200, "GET", csvRead, key, ""); again != text {
			t.Errorf("it reads as\n%s\nbefore it was\n%s", again, text)
		}
	})
	t.Run("by another tenant, without the ids", func(t *testing.T) {
		s.must(t, 200, "POST", "/upload", other, without(text, "series_unit", "series_id"), asCSV)
		copied := s.must(t, 200, "GET", csvRead, other, "")
		if without(copied, "series_id") != without(text, "series_id") {
			t.Errorf("it reads as\n%s\nit was\n%s", copied, text)
		}
	})
}

func TestRunsAreFilteredAndTheNewestKnownComesFirst(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	early := s.mustUpload(t, key, dayAhead).RunID
	late := s.mustUpload(t, key, runWith("", at("2025-01-02", "1"))).RunID
	s.must(t, 200, "POST", "/series", key, `{"name":"empty"}`)
	s.must(t, 200, "POST", "/series", key, `{"name":"gained"}`)
	s.must(t, 200, "PUT", "/values", key,
		corrections(correctionAt("01", `"series_key":"gained","run_id":"`+early+`","value":1`)))
	for _, c := range []struct{ name, query, want string }{ // want: the only run in the answer, or none
		{"a workflow", "?workflow_id=day-ahead", early},
		{"an unknown workflow", "?workflow_id=other", ""},
		{"a limit", "?limit=1", late},
		{"known before, which excludes the time itself", "?end_known=2025-01-01T06:00:00Z", ""},
		{"known within", "?start_known=2025-01-01T06:00:00Z&end_known=2025-01-01T06:00:01Z", early},
		{"known within nothing", "?start_known=2025-01-01T06:00:00Z&end_known=2025-01-01T06:00:00Z", ""},
		{"known before the end of all years", "?limit=1&end_known=9999-12-31", late},
		{"of a series that one run has", "?series_key=wind", early},
		{"of a series that both have", "?series_key=load&limit=1", late},
		{"of a series that gained a value", "?series_key=gained", early},
		{"of a series without values", "?series_key=empty", ""},
		{"of a series and another workflow", "?series_key=wind&workflow_id=api-workflow", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := s.must(t, 200, "GET", "/runs"+c.query, key, "")
			count := strings.Count(text, `"run_id"`)
			if c.want == "" && count != 0 {
				t.Errorf("%s, want no run", text)
			}
			if c.want != "" && (count != 1 || !strings.Contains(text, c.want)) {
				t.Errorf("%s, want run %s alone", text, c.want)
			}
		})
	}
	text := s.must(t, 200, "GET", "/runs", key, "")
	if strings.Index(text, late) > strings.Index(text, early) {
		t.Error("GET /runs does not show the newest known first")
	}
	s.runRequests(t, key, []requestCase{
		{"a limit of 0", "GET", "/runs?limit=0", "", 422, nil},
		{"a limit that is no number", "GET", "/runs?limit=x", "", 422, nil},
		{"an unknown parameter", "GET", "/runs?nope=1", "", 422, nil},
		{"a time that is none", "GET", "/runs?start_known=x", "", 422, nil},
		{"an end before the start", "GET", "/runs?start_known=2025-01-02&end_known=2025-01-01", "", 422, nil},
		{"a series that there is not", "GET", "/runs?series_key=nope", "", 404, []string{"nope"}},
		{"fewer than there are", "GET", "/runs?limit=1", "", 200, []string{`"count":1,"more":true}`}},
		{"as many as there are", "GET", "/runs?limit=2", "", 200, []string{`"count":2,"more":false}`}},
		{"fewer than hold the series", "GET", "/runs?limit=1&series_key=load", "", 200,
			[]string{`"count":1,"more":true}`}},
		{"none", "GET", "/runs?start_known=9999-12-31", "", 200, []string{`{"data":[],"count":0,"more":false}`}},
	})
}

// badUpload is an upload that must be refused.
type badUpload struct {
	name, body string
	status     int
	want       string // in the detail of the refusal: above all the field
}

// goodRow stands before a bad one to show that an upload is stored as a whole or not at all.
var goodRow = at("2025-02-01T00:00:00Z", "1")

// badBodies are wrong as a whole.
func badBodies() []badUpload {
	good := runWith("", goodRow)
	return []badUpload{
		{"nothing", ``, 422, "body: expected a JSON object, and it is empty"},
		{"an open brace", `{`, 422, "body"},
		{"an array", `[]`, 422, "body"},
		{"null", `null`, 422, "body"},
		{"a string", `"text"`, 422, "body"},
		{"an end after a name", `{"run_start_time"`, 422, "early"},
		{"a second object", good + ` {}`, 422, "body"},
		{"a letter at the end", good + `x`, 422, "body"},
		{"an end within a row", good[:60], 422, "value_rows"},
		{"a comma after the last row", runWith("", goodRow+","), 422, "value_rows"},
		{"one bracket too many", runWith("", goodRow+"]"), 422, ""},
		{"4 MiB of white space", "{" + strings.Repeat(" ", 4<<20), 413, "body"},
	}
}

// badMembers have one member of the upload that is wrong.
func badMembers() []badUpload {
	with := func(members string) string { return runWith(members+",", goodRow) }
	nested := func(open, inner, end string, depth int) string {
		return strings.Repeat(open, depth) + inner + strings.Repeat(end, depth)
	}
	return []badUpload{
		{"run_start_time a number", `{"run_start_time":5,"value_rows":[]}`, 422, "run_start_time"},
		{"run_start_time a word", `{"run_start_time":"yesterday","value_rows":[]}`, 422, "run_start_time"},
		{"run_finish_time before the start", with(`"run_finish_time":"2024-12-31T23:59:59Z"`), 422, "run_finish_time"},
		{"run_finish_time before known_time, and no start",
			`{"known_time":"2025-01-02","run_finish_time":"2025-01-01","value_rows":[]}`, 422, "run_finish_time"},
		{"run_finish_time before now, and no start",
			`{"run_finish_time":"2025-01-01","value_rows":[]}`, 422, "run_finish_time"},
		{"known_time a word", with(`"known_time":"soon"`), 422, "known_time"},

		{"workflow_id a number", with(`"workflow_id":7`), 422, "workflow_id"},
		{"workflow_id blank", with(`"workflow_id":" "`), 422, "workflow_id"},
		{"workflow_id with NUL", with(`"workflow_id":"a\u0000b"`), 422, "workflow_id"},
		{"workflow_id with a zero width space", with(`"workflow_id":"a\u200bb"`), 422, "workflow_id"},
		{"workflow_id not UTF-8", with("\"workflow_id\":\"a\xffb\""), 422, "workflow_id"},
		{"workflow_id twice", with(`"workflow_id":"a","workflow_id":"b"`), 422, "workflow_id"},

		{"run_params an array", with(`"run_params":[]`), 422, "run_params"},
		{"run_params a string", with(`"run_params":"x"`), 422, "run_params"},
		{"run_params a number", with(`"run_params":5`), 422, "run_params"},
		{"run_params not UTF-8", with("\"run_params\":{\"a\":\"\xff\"}"), 422, "run_params"},
		{"run_params 100,000 objects deep",
			with(`"run_params":` + nested(`{"a":`, `1`, `}`, 100_000)), 422, "run_params"},
		{"run_params 9,000 arrays deep",
			with(`"run_params":` + nested(`[`, ``, `]`, 9_000)), 422, "run_params"},
		{"run_params 2,500 objects deep beside an unknown member",
			with(`"run_params":` + nested(`{"a":`, `1`, `}`, 2_500) + `,"nope":1`), 422, "nope"},

		{"create_series a text", with(`"create_series":"no"`), 422, "create_series: expected true or false"},
		{"create_series a number", with(`"create_series":0`), 422, "create_series: expected true or false"},

		{"series_descriptions of no row", with(`"series_descriptions":{"wind":"w"}`), 422, "wind"},
		{"series_descriptions an array", with(`"series_descriptions":[]`), 422, "series_descriptions"},
		{"series_descriptions with a number", with(`"series_descriptions":{"load":5}`), 422, "series_descriptions"},

		{"run_id no UUID", with(`"run_id":"nope"`), 422, "run_id"},
		{"run_id a number", with(`"run_id":5`), 422, "run_id"},
		{"run_id one digit too long", with(`"run_id":"` + nobody + `0"`), 422, "run_id"},
		{"run_id of a run that exists", with(`"run_id":"` + nobody + `"`), 409, "run_id"},
		{"tenant_id of another tenant", with(`"tenant_id":"` + tenantB + `"`), 403, "tenant_id"},

		{"an unknown member", with(`"extra":1`), 422, "extra"},
		{"a known member in other capitals", with(`"Workflow_ID":"x"`), 422, "Workflow_ID"},
		{"value_rows in capitals", with(`"VALUE_ROWS":[]`), 422, "VALUE_ROWS"},
		{"value_rows twice", with(`"value_rows":[]`), 422, "value_rows"},
		{"value_rows an object", `{"run_start_time":"2025-01-01","value_rows":{}}`, 422, "value_rows"},
		{"value_rows null", `{"run_start_time":"2025-01-01","value_rows":null}`, 422, "value_rows"},
	}
}

// badRows have a second row that is wrong. seriesA is the caller's series load, seriesB a series of another tenant.
func badRows(seriesA, seriesB string) []badUpload {
	second := func(row string) string { return runWith("", goodRow, row) }
	row := func(members string) string { return second(`{"valid_time":"2025-01-01",` + members + `}`) }
	load := func(value string) string { return row(`"value_key":"load","value":` + value) }
	ends := func(start, end string) string { return second(at(start, "1", `,"valid_time_end":"`+end+`"`)) }
	const first, again = "2025-01-01T00:00:00.1234567Z", "2025-01-01T00:00:00.1234569Z"
	return []badUpload{
		{"a row a number", second(`5`), 422, "value_rows[1]"},
		{"a row an array", second(`[]`), 422, "value_rows[1]"},
		{"a row null", second(`null`), 422, "value_rows[1]"},
		{"an unknown member of a row", load(`1,"extra":1`), 422, "extra"},

		{"no valid_time", second(`{"value_key":"load","value":1}`), 422, "value_rows[1].valid_time"},
		{"valid_time null",
			second(`{"valid_time":null,"value_key":"load","value":1}`), 422, "value_rows[1].valid_time"},
		{"valid_time a number", second(`{"valid_time":5,"value_key":"load","value":1}`), 422, "valid_time"},
		{"valid_time_end the same", ends("2025-01-01", "2025-01-01"), 422, "value_rows[1].valid_time_end"},
		{"valid_time_end the same elsewhere", ends("2025-01-02", "2025-01-01T23:00-01:00"), 422, "valid_time_end"},
		{"valid_time_end a word", ends("2025-01-01", "later"), 422, "valid_time_end"},

		{"no series", row(`"value":1`), 422, "value_rows[1].value_key"},
		{"value_key empty", row(`"value_key":"","value":1`), 422, "value_key"},
		{"value_key blank", row(`"value_key":" \t","value":1`), 422, "value_key"},
		{"value_key a number", row(`"value_key":5,"value":1`), 422, "value_key"},
		{"value_key with NUL", row(`"value_key":"a\u0000","value":1`), 422, "value_key"},
		{"value_key with a zero width space at its end", row(`"value_key":"load\u200b","value":1`), 422, "value_key"},
		{"value_key that turns the direction", row(`"value_key":"lo\u202ead","value":1`), 422, "value_key"},
		{"value_key of 500 bytes and a space",
			row(`"value_key":"` + strings.Repeat("x", 500) + ` ","value":1`), 422, "value_key"},
		{"value_key and another series_key",
			row(`"value_key":"load","series_key":"wind","value":1`), 422, "value_rows[1].series_key"},
		{"series_key blank", row(`"series_key":" ","value":1`), 422, "value_rows[1].series_key"},
		{"series_key a number", row(`"series_key":5,"value":1`), 422, "series_key: expected text"},
		{"value_key not UTF-8", row("\"value_key\":\"\xff\",\"value\":1"), 422, "value_key"},
		{"series_id no UUID", row(`"series_id":"nope","value":1`), 422, "series_id"},
		{"series_id of no series", row(`"series_id":"` + nobody + `","value":1`), 404, "series_id"},
		{"series_id of another tenant", row(`"series_id":"` + seriesB + `","value":1`), 404, "series_id"},
		{"series_id with another value_key",
			row(`"series_id":"` + seriesA + `","value_key":"wind","value":1`), 422, "wind"},

		{"no value", row(`"value_key":"load"`), 422, "value_rows[1].value"},
		{"value a string", load(`"1"`), 422, "value"},
		{"value true", load(`true`), 422, "value"},
		{"value NaN", load(`NaN`), 422, "in place of NaN or Infinity send null"},
		{"value Infinity", load(`Infinity`), 422, "in place of NaN or Infinity send null"},
		{"value too large", load(`1e999`), 422, "value"},
		{"value -Infinity", load(`-Infinity`), 422, "in place of NaN or Infinity send null"},
		{"value NaN as a string", load(`"NaN"`), 422, "value"},
		{"value an array", load(`[1]`), 422, "value"},

		{"the same row twice", second(goodRow), 422,
			`value_rows[1]: valid_time 2025-02-01T00:00:00+00:00 occurs twice for series \"load\"`},
		{"one time three times, among others", runWith("", goodRow, at("2025-02-03", "1"),
			seriesRow("wind", "2025-02-01", "1"), at("2025-02-01", "1"), at("2025-02-02", "1"),
			at("2025-02-01", "1")), 422, `value_rows[3]: valid_time 2025-02-01T00:00:00+00:00`},
		{"one time twice, written in two zones", second(at("2025-02-01T01:00:00+01:00", "2")), 422, "twice"},
		{"one series twice, by key and by id",
			second(`{"valid_time":"2025-02-01","series_id":"` + seriesA + `","value":1}`), 422, "value_rows[1]"},
		{"one series twice, by key and by id, the id first",
			runWith("", `{"valid_time":"2025-02-01","series_id":"`+seriesA+`","value":1}`, at("2025-02-02", "1"), goodRow),
			422, `value_rows[2]: valid_time 2025-02-01T00:00:00+00:00 occurs twice for series \"load\"`},
		{"one series twice, with a space and without", second(seriesRow("load ", "2025-02-01", "1")), 422, "value_rows[1]"},
		{"one interval twice", runWith("", at("2025-01-01", "1", `,"valid_time_end":"2025-01-02"`),
			at("2025-01-01", "2", `,"valid_time_end":"2025-01-02T00:00:00Z"`)), 422, "twice"},
		{"one microsecond twice", runWith("", at(first, "1"), at(again, "1")), 422, "twice"},
	}
}

// badTimes are uploads with a valid_time that is no timestamp, or is outside the years 1677 to 2262.
func badTimes() []badUpload {
	var all []badUpload
	for _, text := range []string{
		"", "yesterday", "1735689600", "2025", "2025-01", "2025-1-1", "2025-13-01", "2025-02-30",
		"2025-02-29T00:00:00Z", "20250101T000000Z",
		"2025-01-01T24:00:01Z", "2025-01-01T25:00:00Z", "2025-01-01T00:60:00Z", "2025-01-01T00:00:61Z",
		"2025-01-01T00:00:00+99:00", "2025-01-01T00:00:00+14:01", "2025-01-01T00:00:00-1201", "2025-01-01T00:00+23",
		"2025-01-01T00:00:00 UTC", "2025-01-01T1:00:00Z",
		"2025-01-01T00:00:00Z[UTC]", "0001-01-01T00:00:00Z", "1676-12-31T23:59:59Z", "2263-01-01T00:00:00Z",
		"9999-12-31", "12025-01-01", "-2025-01-01", "infinity", "now",
		"2025-01-01T00:00:00Zx", "2025-01-01T00:00:00.Z", " 2025-01-01",
	} {
		name := fmt.Sprintf("valid_time %q", text)
		all = append(all, badUpload{name, runWith("", goodRow, at(text, "1")), 422, "valid_time"})
	}
	return all
}

// badCSVs are bodies of type text/csv; the parameters beside them are right.
func badCSVs() []badUpload {
	const header = "valid_time,value_key,value\n"
	const good = header + "2025-02-01,load,1\n"
	commas := strings.Repeat(",", 1<<20)
	return []badUpload{
		{"nothing", "", 422, "header: expected valid_time,value_key,value, and the body is empty"},
		{"no column value", "valid_time,value_key\n2025-01-01,load\n", 422, "value"},
		{"no column value and no row", "valid_time,value_key\n", 422, "value"},
		{"no column valid_time", "value_key,value\n2025,x\n", 422, "valid_time"},
		{"no column of the series", "valid_time,value\n", 422, "series_id"},
		{"only the column value", "value\n", 422, "value_key"},
		{"an unknown column", "valid_time,value_key,value,extra\n", 422, "extra"},
		{"a column twice", "valid_time,value,value_key,value\n", 422, "value"},
		{"a column in capitals", "Valid_Time,value_key,value\n", 422, "Valid_Time"},
		{"semicolons", "valid_time;value_key;value\n", 422, "header: expected commas"},
		{"tabs", "valid_time\tvalue_key\tvalue\n", 422, "header: expected commas"},
		{"the index of pandas", ",valid_time,value_key,value\n0,2025-01-01,load,1\n", 422, "to_csv(index=False)"},
		{"the columns of a read in detail", "valid_time,series_id,value,series_key,series_unit,run_id,known_time," +
			"valid_time_end,change_time,changed_by,annotation,tags,version\n", 422, "line[1].series_unit, run_id, known_time, " +
			"change_time, changed_by, annotation, tags, version: unknown in the header, to be dropped or renamed; there are series_id, "},
		{"a misspelt column", "valid_tim,value_key,value\n", 422, "did you mean valid_time?"},

		{"a short line", good + "2025-02-02,load\n", 422, "3"},
		{"a value that is a word", good + "2025-02-02,load,one\n", 422, "value"},
		{"a value that is a letter, on line 3", good + "2025-02-01,load,x\n", 422, "line[3].value"},
		{"a short line after that of a series", good + "2025-02-02\n", 422, `cells, as in the header"`},
		{"a value that is a letter, of a series", good + "2025-02-01,load,x\n", 422, `the series is \"load\"`},
		{"a value with an underscore", header + "2025-02-01,load,1_0\n", 422, "line[2].value"},
		{"a value Infinity", header + "2025-02-01,load,Infinity\n", 422, "value"},
		{"a value too large", header + "2025-02-01,load,1e999\n", 422, "value"},
		{"no valid_time", header + ",load,1\n", 422, "valid_time"},
		{"a valid_time that is a word", header + "soon,load,1\n", 422, "valid_time"},
		{"no value_key", header + "2025-02-01,,1\n", 422, "value_key"},
		{"value_key and another series_key",
			"valid_time,value_key,value,series_key\n2025-02-01,load,1,wind\n", 422, "line[2].series_key"},
		{"a value_key with a byte order mark", header + "2025-02-01,\ufeffload,1\n", 422, "line[2].value_key"},
		{"a value_key not UTF-8", header + "2025-02-01,\xff,1\n", 422, "value_key"},
		{"one time twice", good + "2025-02-01 00:00,load,2\n", 422, "line[3]"},
		{"one time twice, among others and after an empty line", header + "2025-10-26 01:00,load,1\n\n2025-10-26 02:00,load,1\n" +
			"2025-10-26 02:00,wind,1\n2025-10-26 02:30,load,1\n2025-10-26 02:00,load,1\n", 422,
			`line[7]: valid_time 2025-10-26T02:00:00+00:00 occurs twice for series \"load\"; a time without an offset`},

		{"a quote that is not closed", header + "2025-02-01,\"load,1\n", 422, ""},
		{"quotes that are not closed, over many lines",
			strings.Repeat(`"`+strings.Repeat(",", 4000)+"\n", 1000), 422, `missing \"`},
		{"a header of 1 MiB", commas, 422, "lines of at most"},
		{"a line of 1 MiB", strings.TrimSuffix(good, "\n") + commas, 422, "lines of at most"},
	}
}

// gzipBomb is a small body that is 200 MiB long once unpacked: an upload of rows that are mostly white space, or one name.
func gzipBomb(ofRows bool) string {
	var b bytes.Buffer
	w, _ := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if ofRows {
		io.WriteString(w, longRows(200<<20))
	} else {
		io.WriteString(w, `{"`+strings.Repeat("x", 200<<20))
	}
	w.Close()
	return b.String()
}

// longRows is an upload of so many bytes or more, none of whose elements is long.
func longRows(bytes int) string {
	row := at("2025-01-01", "1") + "," + strings.Repeat(" ", 32<<10)
	rows := strings.Repeat(row, bytes/len(row)+1)
	return runWith("", rows+at("2025-01-02", "1"))
}

// mustRefuseUpload sends an upload that must be refused and store nothing.
func (s *testServer) mustRefuseUpload(t *testing.T, key, path string, c badUpload, header ...string) {
	t.Helper()
	before := s.stored(t)
	text := s.must(t, c.status, "POST", path, key, c.body, header...)
	expectIn(t, fmt.Sprintf("%.300s", c.body), text, c.want)
	if s.stored(t) != before {
		t.Errorf("%.300s: refused, and yet something was stored", c.body)
	}
}

func TestBadUploadIsRefusedAndStoresNothing(t *testing.T) { // S21, S22
	t.Parallel()
	s, key := mustTenant(t)
	other := s.mustUser(t, tenantB, "b@example.com")
	seriesA := s.mustUpload(t, key, runWith(`"run_id":"`+nobody+`",`, at("2025-01-01", "1"))).SeriesIDs["load"]
	seriesB := s.mustUpload(t, other, oneValue).SeriesIDs["load"]
	for _, c := range slices.Concat(badBodies(), badMembers(), badRows(seriesA, seriesB), badTimes()) {
		t.Run("JSON: "+c.name, func(t *testing.T) {
			s.mustRefuseUpload(t, key, "/upload", c)
		})
	}
	for _, c := range badCSVs() {
		t.Run("CSV: "+c.name, func(t *testing.T) {
			s.mustRefuseUpload(t, key, "/upload?run_start_time=2025-01-01", c, "Content-Type: text/csv")
		})
	}
	good := runWith("", goodRow)
	const inJSON, inCSV, header = "application/json", "text/csv", "valid_time,value_key,value\n"
	for _, c := range []struct{ name, kind, query, body, want string }{
		{"unknown, beside JSON", inJSON, "?nope=1", good, "nope"},
		{"of CSV, beside JSON", inJSON, "?workflow_id=x", good, "workflow_id"},
		{"create_series neither true nor false", inCSV, "?create_series=no", header, "create_series: expected true or false"},
		{"create_series, beside JSON", inJSON, "?create_series=false", good, "create_series"},
		{"no timestamp", inCSV, "?run_start_time=x", header, "run_start_time"},
		{"value_rows", inCSV, "?run_start_time=2025-01-01&value_rows=x", header, "value_rows"},
		{"unknown, beside CSV", inCSV, "?run_start_time=2025-01-01&nope=1", "", "nope"},
		{"given twice", inCSV, "?run_start_time=2025-01-01&run_start_time=2025-01-02", header, "run_start_time"},
		{"no object", inCSV, "?run_start_time=2025-01-01&run_params=x", header, "run_params"},
	} {
		t.Run("parameter: "+c.name, func(t *testing.T) {
			refused := badUpload{c.name, c.body, 422, c.want}
			s.mustRefuseUpload(t, key, "/upload"+c.query, refused, "Content-Type: "+c.kind)
		})
	}
	const asGzip = "Content-Encoding: gzip"
	zipped := gzipped(good)
	long := `{"workflow_id":"` + strings.Repeat("x", 80<<20)
	for _, c := range []struct {
		name, header, body string
		status             int
		want               string
	}{
		{"plain text", "Content-Type: text/plain", good, 415, "Content-Type"},
		{"a form", "Content-Type: application/x-www-form-urlencoded", good, 415, "Content-Type"},
		{"half a media type", "Content-Type: nonsense/", good, 415, "Content-Type"},
		{"latin1", "Content-Type: application/json; charset=latin1", good, 415, "Content-Type"},
		{"brotli", "Content-Encoding: br", good, 415, "Content-Encoding"},
		{"no gzip where it is said to be", asGzip, good, 422, "body"},
		{"gzip cut off", asGzip, zipped[:len(zipped)-12], 422, ""},
		{"gzip with a wrong checksum", asGzip, zipped[:len(zipped)-6] + "\x00\x00\x00\x00\x00\x00", 422, ""},
		{"200 MiB of rows in gzip", asGzip, gzipBomb(true), 413, "larger"},
		{"a name of 200 MiB in gzip", asGzip, gzipBomb(false), 413, "at most 65536 bytes"},
		{"80 MiB of rows", "Content-Type: application/json", longRows(80 << 20), 413, "larger"},
		{"a text of 80 MiB", "Content-Type: application/json", long, 413, "workflow_id: expected"},
		{"a row of 70 KiB", "Content-Type: application/json", runWith("", goodRow+`,{"value_key":"`+
			strings.Repeat("x", 70<<10)), 413, "value_rows[1]: expected"},
	} {
		t.Run("encoding: "+c.name, func(t *testing.T) {
			s.mustRefuseUpload(t, key, "/upload", badUpload{c.name, c.body, c.status, c.want}, c.header)
		})
	}
	t.Run("the server still serves", func(t *testing.T) {
		s.mustRefuseUpload(t, key, "/upload", badUpload{"an open brace", "{", 422, "body"})
	})
	if log := s.log.String(); strings.Contains(log, "status=500") {
		t.Errorf("a refused upload was an internal error: %s", log)
	}
}

// valuesOf reads what is stored under a name, with the name, the id and known_time taken out.
func (s *testServer) valuesOf(t *testing.T, key, name string) string {
	t.Helper()
	id := mustQuery(t, s.db, `SELECT series_id FROM series_table WHERE series_key = $1`, name)
	text := s.must(t, 200, "GET", "/values?mode=overlapping&series_key="+name, key, "")
	text = regexp.MustCompile(`"known_time":"[^"]*"`).ReplaceAllString(text, "")
	return strings.NewReplacer(id, "", `"`+name+`"`, "").Replace(text)
}

func TestCSVAndGzipStoreWhatJSONStores(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	jsonBody := runWith("", at("2025-01-01T00:00:00Z", "1.5"), at("2025-01-01T01:00:00+00:00", "null"),
		at("2025-01-01 02:00", "1e-7"), at("2025-01-01T00:00:00Z", "-3", `,"valid_time_end":"2025-01-02"`))
	csvBody := "value_key,value,valid_time_end,valid_time\r\n" +
		"load,1.5,,2025-01-01T00:00:00Z\r\n" +
		"load,NaN,,2025-01-01T01:00:00+00:00\r\n" +
		"\"load\",1e-7,,2025-01-01 02:00\n" +
		"load,-3,2025-01-02,2025-01-01T00:00:00Z"
	s.must(t, 200, "POST", "/upload", key, jsonBody)
	want := s.valuesOf(t, key, "load")
	if strings.Count(want, `"value":`) != 4 || !strings.Contains(want, `"value":null`) {
		t.Errorf("JSON stores %s", want)
	}
	named := func(text, name string) string { return strings.ReplaceAll(text, "load", name) }
	const parameters = "?run_start_time=2025-01-01T00:00:00+00:00&run_params=%7B%22a%22:1%7D&workflow_id=csv"
	const asCSV, zipped = "Content-Type: text/csv", "Content-Encoding: gzip"
	for _, c := range []struct {
		name, query, body string // the name is that of the series, too
		header            []string
	}{
		{"zipped", "", gzipped(named(jsonBody, "zipped")), []string{zipped}},
		{"csv", parameters, named(csvBody, "csv"), []string{asCSV + "; charset=UTF-8"}},
		{"empty", parameters, named(strings.Replace(csvBody, "NaN", "", 1), "empty"), []string{asCSV}},
		{"both", parameters, gzipped(named(csvBody, "both")), []string{asCSV, zipped}},
		{"excel", parameters, "\ufeff" + named(csvBody, "excel"), []string{asCSV}}, // with a byte order mark
		{"column", parameters, named(strings.Replace(csvBody, "value_key", "series_key", 1), "column"), []string{asCSV}},
		{"member", "", strings.ReplaceAll(named(jsonBody, "member"), "value_key", "series_key"), nil},
		{"padded", parameters, strings.ReplaceAll(csvBody, "load", " \u00a0padded\u3000 "), []string{asCSV}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.must(t, 200, "POST", "/upload"+c.query, key, c.body, c.header...)
			if got := s.valuesOf(t, key, c.name); got != want {
				t.Errorf("it stores %s\nJSON stores %s", got, want)
			}
		})
	}
	got := mustQuery(t, s.db, `SELECT count(*) FROM runs_table
		WHERE workflow_id = 'csv' AND run_params->>'a' = '1'`)
	if got != "6" {
		t.Errorf("%s of 6 CSV uploads have their run_params", got)
	}
}

// ---- Reads

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

// uploadOddSeries uploads a series with a name that JSON and CSV must quote, a fraction of a second and extreme
// values.
func uploadOddSeries(t *testing.T, s *testServer, key string) {
	t.Helper()
	s.must(t, 200, "POST", "/upload", key, runWith("",
		`{"valid_time":"2025-06-01T02:00:00.000250+02:00","value_key":"a \"quoted\", <ü>\\","value":1e-7}`,
		`{"valid_time":"2025-06-01T02:00:00+02:00","value_key":"a \"quoted\", <ü>\\","value":-1e300}`))
}

func TestRowsAreWrittenAsDocumented(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, series := mustPicture(t, s)
	uploadOddSeries(t, s, key)
	stored := func(column, where string) string {
		return mustQuery(t, s.db, `SELECT `+column+` FROM values_table v
			JOIN series_table s USING (tenant_id, series_number) WHERE `+where)
	}
	change := func(where string) string {
		return stored(`to_char(change_time AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')`, where)
	}
	load := `"series_id":"` + series["load"] + `","series_key":"load","series_unit":"dimensionless"`
	price := `"series_id":"` + series["price"] + `","series_key":"price","series_unit":"dimensionless",` +
		`"valid_time_end":"2025-01-01T01:00:00+00:00"`
	const corrected, ofPrice = "series_key = 'load' AND version = 2", "series_key = 'price'"
	for _, c := range []struct{ name, query, want string }{
		{"flat", "series_key=load",
			`{"valid_time":"2025-01-01T00:00:00+00:00",` + load + `,"value":1.0}`},
		{"overlapping, with no value", "series_key=load&mode=overlapping&start_valid=2025-01-01T02:00:00Z",
			`{"known_time":"2024-12-31T00:00:00.000000+00:00","valid_time":"2025-01-01T02:00:00+00:00",` + load +
				`,"value":null}`},
		{"of an interval", "series_key=price",
			`{"valid_time":"2025-01-01T00:00:00+00:00",` + price + `,"value":10.0}`},
		{"detail of a correction", "series_key=load&detail=true&start_valid=2025-01-01T02:00:00Z",
			`{"known_time":"2024-12-31T12:00:00.000000+00:00","valid_time":"2025-01-01T02:00:00+00:00",` + load +
				`,"value":3.75,"run_id":"` + stored("run_id", corrected) + `","valid_time_end":null,"change_time":"` +
				change(corrected) +
				`","changed_by":"a@example.com","annotation":"checked","tags":["a","b"],"version":2}`},
		{"all versions of an interval", "series_key=price&mode=overlapping&all_versions=true",
			`{"known_time":"2024-12-31T12:00:00.000000+00:00","valid_time":"2025-01-01T00:00:00+00:00",` + price +
				`,"value":10.0,"run_id":"` + stored("run_id", ofPrice) + `","change_time":"` + change(ofPrice) +
				`","changed_by":"a@example.com","annotation":null,"tags":null,"version":1}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := s.must(t, 200, "GET", "/values?limit=1&"+c.query, key, "")
			got := mustDecode[struct{ Data []json.RawMessage }](t, text)
			if len(got.Data) != 1 || canonical(t, string(got.Data[0])) != canonical(t, c.want) {
				t.Errorf("it shows %s\nwant     %s", got.Data, c.want)
			}
		})
	}
	t.Run("an odd key, a fraction of a second, extreme values", func(t *testing.T) {
		text := s.must(t, 200, "GET", "/values?start_valid=2025-06-01", key, "")
		if name := mustDecode[readAnswer](t, text).Data[0].Key; name != `a "quoted", <ü>\` {
			t.Errorf("the key is %q", name)
		}
		expectIn(t, "the rows", text, `"2025-06-01T00:00:00.000250+00:00"`, `"value":1e-07`, `"value":-1e+300`)
	})
	t.Run("nothing to show", func(t *testing.T) {
		got := s.must(t, 200, "GET", "/values?start_valid=2030-01-01", key, "")
		if got != `{"data":[],"count":0,"more":false}`+"\n" {
			t.Errorf("%q", got)
		}
	})
}

func TestCSVRowsAreWrittenAsDocumented(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	key, series := mustPicture(t, s)
	uploadOddSeries(t, s, key)
	const columns = "valid_time,series_id,value,series_key,series_unit,valid_time_end\n"
	const window = "series_key=load&start_valid=2025-01-01T02:00:00Z"
	id := series["load"]
	flat := columns +
		"2025-01-01T02:00:00+00:00," + id + `,3.75,"load","dimensionless",` + "\n" +
		"2025-01-01T03:00:00+00:00," + id + `,9.0,"load","dimensionless",` + "\n"
	overlapping := "known_time," + columns +
		"2024-12-31T00:00:00.000000+00:00,2025-01-01T02:00:00+00:00," + id + `,,"load","dimensionless",` + "\n"
	for _, c := range []struct {
		name, query string
		header      []string
		want        string
	}{
		{"by the parameter", window + "&format=csv", nil, flat},
		{"by the header Accept", window, []string{"Accept: text/csv"}, flat},
		{"no value; the parameter goes before the header",
			window + "&end_known=2024-12-31T12:00:00Z&mode=overlapping&format=csv",
			[]string{"Accept: application/json"}, overlapping},
		{"nothing to show", "start_valid=2030-01-01&format=csv", nil, columns},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := s.must(t, 200, "GET", "/values?"+c.query, key, "", c.header...)
			if got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
	t.Run("an odd key", func(t *testing.T) {
		text := s.must(t, 200, "GET", "/values?start_valid=2025-06-01T00:00:00.0001Z&format=csv", key, "")
		expectIn(t, "the row", text, `,1e-07,"a ""quoted"", <ü>\","dimensionless",`)
	})
	for _, mode := range []string{"flat", "overlapping"} {
		t.Run("detail, "+mode, func(t *testing.T) {
			query := "/values?series_key=load&detail=true&mode=" + mode
			text := s.must(t, 200, "GET", query+"&start_valid=2025-01-01T02:00:00Z&format=csv", key, "")
			expectIn(t, "a correction", text, `,"a@example.com","checked","[""a"",""b""]",2`+"\n")
			header, _, _ := strings.Cut(text, "\n")
			members := firstRowsMembers(s.must(t, 200, "GET", query+"&limit=1", key, ""))
			if header != strings.Join(members, ",") {
				t.Errorf("the columns of CSV are %s, the members of JSON %q", header, members)
			}
		})
	}
}

// A row is sent when some have gathered, and not held until the answer is complete.
func TestRowsAreSentWhileTheyAreRead(t *testing.T) { // S35
	for _, csv := range []bool{false, true} {
		t.Run(fmt.Sprintf("csv=%v", csv), func(t *testing.T) {
			sent := httptest.NewRecorder()
			out := newRowWriter(&response{rw: timelessRecorder{sent}}, csv, "value")
			for range flushBytes {
				out.number(1)
				if err := out.endRow(); err != nil {
					t.Fatal(err)
				}
				if len(out.buf) > flushBytes {
					t.Fatalf("%d bytes are held, and %d sent", len(out.buf), sent.Body.Len())
				}
			}
		})
	}
}

func TestAnswerTellsWhetherThereIsMore(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	s := mustAPI(t, dsn)
	key, _ := mustPicture(t, s) // of which a flat read has 7 rows
	cert, private := mustCertificate(t)
	overTLS := mustAPI(t, dsn, "--tls-cert", cert, "--tls-key", private)
	overTLS.client = &http.Client{Transport: &http.Transport{
		ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: mustTrust(t, cert)}}}
	for _, protocol := range []struct {
		name   string
		server *testServer
	}{{"HTTP/1.1", s}, {"HTTP/2.0", overTLS}} {
		for _, c := range []struct {
			name, query string
			rows        int
			more        bool
		}{
			{"no limit", "", 7, false},
			{"a limit of one row less", "limit=6", 6, true},
			{"a limit of all rows", "limit=7", 7, false},
			{"a limit of one row more", "limit=8", 7, false},
			{"no row", "limit=1&start_valid=2030-01-01", 0, false},
			{"a limit of buckets", "bucket=1h&agg=count&limit=5", 5, true},
			{"all buckets", "bucket=1h&agg=count&limit=6", 6, false},
			{"a limit of series", "latest=true&limit=2", 2, true},
			{"all series", "latest=true&limit=3", 3, false},
		} {
			t.Run(protocol.name+", "+c.name, func(t *testing.T) {
				path := "/values?" + c.query
				text := protocol.server.must(t, 200, "GET", path, key, "")
				expectIn(t, path, text, fmt.Sprintf(`"count":%d,"more":%v}`, c.rows, c.more))
				resp, lines, err := protocol.server.do("GET", path+"&format=csv", key, "")
				if err != nil || resp.Proto != protocol.name || strings.Count(lines, "\n") != 1+c.rows {
					t.Fatalf("%v %v %s", resp, err, lines)
				}
				if got := resp.Trailer.Get("X-More"); got != fmt.Sprint(c.more) {
					t.Errorf("the trailer X-More is %q, want %v; the header is %v", got, c.more, resp.Header)
				}
			})
		}
	}
	t.Run("a long answer, compressed", func(t *testing.T) {
		mustManyValues(t, s, key, 20_000)
		path := "/values?format=csv&limit=10000&series_key=load&end_valid=2021-01-01"
		resp, text, err := s.do("GET", path, key, "", "Accept-Encoding: gzip")
		if err != nil || resp.Header.Get("Content-Encoding") != "gzip" || resp.Trailer.Get("X-More") != "true" {
			t.Fatalf("%v, trailer %v, %v", resp, resp.Trailer, err)
		}
		if lines := strings.Count(mustUnzip(t, text), "\n"); lines != 10_001 {
			t.Errorf("%d lines", lines)
		}
	})
	t.Run("a refusal has no trailer", func(t *testing.T) {
		resp, _, err := s.do("GET", "/values?format=csv&series_key=nope", key, "")
		if err != nil || resp.StatusCode != 404 || len(resp.Trailer) > 0 || resp.ContentLength <= 0 {
			t.Errorf("%v %v, trailer %v", resp, err, resp.Trailer)
		}
	})
}

// firstRowsMembers are the names of the members of the first row of a read, in the order in which they are written.
func firstRowsMembers(text string) []string {
	dec := json.NewDecoder(strings.NewReader(text))
	for range 4 { // {, "data", [, {
		dec.Token()
	}
	var names []string
	for dec.More() {
		name, _ := dec.Token()
		names = append(names, name.(string))
		var value any
		dec.Decode(&value)
	}
	return names
}

// mustManyValues uploads n values of the series load in steps of a minute.
func mustManyValues(t testing.TB, s *testServer, key string, n int) {
	t.Helper()
	const most = 250_000 // of one upload
	begin := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	for first := 0; first < n; first += most {
		text := []byte(`{"run_start_time":"2020-01-01","known_time":"2020-01-01","value_rows":[`)
		for i := first; i < min(n, first+most); i++ {
			text = append(text, `{"value_key":"load","valid_time":"`...)
			text = begin.Add(time.Duration(i)*time.Minute).AppendFormat(text, time.RFC3339)
			text = append(text, `","value":`...)
			text = strconv.AppendInt(text, int64(i%1000), 10)
			text = append(text, ".25},"...)
		}
		s.must(t, 200, "POST", "/upload", key, string(text[:len(text)-1])+"]}")
	}
}

// longRead reads 64,800 values of mustManyValues. Their answer is sent in several pieces.
const longRead = "/values?end_valid=2020-02-15T00:00:00Z"

func TestLongResponsesAreCompleteOrVisiblyBroken(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	mustManyValues(t, s, key, 1_000_000)
	text := s.must(t, 200, "GET", longRead, key, "")
	got := mustDecode[readAnswer](t, text)
	if got.Count != 64_800 || len(got.Data) != 64_800 || len(text) < 5<<20 {
		t.Fatalf("%d rows, count %d, %d bytes", len(got.Data), got.Count, len(text))
	}
	if last := got.Data[64_799].Valid.Format("01-02T15:04"); last != "02-14T23:59" {
		t.Errorf("the last row is of %s", last)
	}
	for _, c := range []struct{ name, query, encoding string }{
		{"flat", "", ""}, // without an encoding http.Client asks for gzip, and unpacks it
		{"overlapping with detail", "?mode=overlapping&detail=true", ""},
		{"CSV", "?format=csv", ""},
		{"compressed", "?format=json", "gzip"}, // it is not unpacked
	} {
		t.Run(c.name+", broken", func(t *testing.T) {
			r, _ := http.NewRequest("GET", s.url+"/values"+c.query, nil)
			r.Header.Set("X-API-Key", key)
			if c.encoding != "" {
				r.Header.Set("Accept-Encoding", c.encoding)
			}
			resp, err := s.client.Do(r)
			if err != nil || resp.StatusCode != 200 {
				t.Fatalf("%v %v", resp, err)
			}
			defer resp.Body.Close()
			// The response has begun, and the database still has most of it.
			if _, err := io.CopyN(io.Discard, resp.Body, 1000); err != nil {
				t.Fatal(err)
			}
			mustExec(t, s.db, `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
				WHERE datname = current_database() AND usename = $1`, appRole.name)
			size, err := io.Copy(io.Discard, resp.Body)
			if err == nil {
				t.Errorf("it ended after %d bytes as if it were complete", size)
			}
		})
	}
	s.must(t, 200, "GET", longRead+"&limit=1", key, "") // a broken connection to the database is not used again
	expectIn(t, "the log", s.log.String(), "broken=true")
	// A client of HTTP/1.0 could not see that an answer is broken.
	line := s.mustRaw(t, "GET /values HTTP/1.0\r\nHost: x\r\nX-API-Key: "+key+"\r\n\r\n")
	expectIn(t, "HTTP/1.0", line, " 505 ")
}

func TestResponsesAreCompressedForClientsThatTakeGzip(t *testing.T) {
	t.Parallel()
	s, key := mustTenant(t)
	mustManyValues(t, s, key, 64_800)
	for _, answer := range []struct{ name, path string }{
		{"many pieces", longRead},
		{"one piece", longRead + "&limit=200"},
	} {
		plain := s.must(t, 200, "GET", answer.path, key, "", "Accept-Encoding: identity")
		for _, c := range []struct {
			name       string // the header Accept-Encoding
			compressed bool
		}{
			{"gzip", true},
			{"deflate, GZIP;q=0.5", true},
			{"br", false},
			{"gzip;q=0", false},
			{"identity", false},
			{"xgzip", false},
		} {
			t.Run(answer.name+", "+c.name, func(t *testing.T) {
				resp, got, err := s.do("GET", answer.path, key, "", "Accept-Encoding: "+c.name)
				if err != nil || resp.StatusCode != 200 {
					t.Fatal(resp, err)
				}
				zipped := resp.Header.Get("Content-Encoding") == "gzip"
				if zipped != c.compressed || !strings.Contains(resp.Header.Get("Vary"), "Accept-Encoding") {
					t.Fatalf("the header is %v", resp.Header)
				}
				if zipped {
					if len(got) > len(plain)/5 {
						t.Errorf("%d bytes are compressed to %d", len(plain), len(got))
					}
					got = mustUnzip(t, got)
				}
				if got != plain {
					t.Error("it differs from the plain response")
				}
			})
		}
	}
}

// ---- openapi.json

type jsonObject = map[string]any

// document is web/openapi.json.
type document struct {
	t          *testing.T
	text       string // the order of members is known only here
	root       jsonObject
	operations map[string]jsonObject // by "METHOD path"
	seen       map[string]bool       // answers that were checked, as "METHOD path status type"
}

func mustDocument(t *testing.T) *document {
	t.Helper()
	text, err := web.ReadFile("web/openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	d := &document{
		t:          t,
		text:       string(text),
		root:       mustDecode[jsonObject](t, string(text)),
		operations: map[string]jsonObject{},
		seen:       map[string]bool{},
	}
	for path, item := range d.at(d.root, "paths") {
		for method, operation := range d.at(item) {
			d.operations[strings.ToUpper(method)+" "+path] = d.at(operation)
		}
	}
	return d
}

// at follows members down from a node, and any $ref on the way. Where nothing is, it returns an empty object.
func (d *document) at(node any, names ...string) jsonObject {
	found, _ := node.(jsonObject)
	if ref, ok := found["$ref"].(string); ok {
		target := strings.Split(strings.TrimPrefix(ref, "#/"), "/")
		return d.at(d.root, append(target, names...)...)
	}
	if len(names) > 0 {
		return d.at(found[names[0]], names[1:]...)
	}
	return found
}

// absent stands for a member that is not there. It satisfies every schema, yet the keywords of its schema are looked
// at.
type absent struct{}

// broken says what a decoded JSON value has that its schema does not allow. It knows the keywords that the document
// uses and fails the test at any other, so that nothing is written that no test checks. For this it looks at all
// keywords, even after one is broken.
func (d *document) broken(schema jsonObject, value any) error {
	var errs []error
	for keyword, want := range schema {
		errs = append(errs, d.brokenBy(keyword, want, schema, value))
	}
	return errors.Join(errs...)
}

// brokenBy is broken for one keyword of the schema; want is what stands at it.
func (d *document) brokenBy(keyword string, want any, schema jsonObject, value any) error {
	switch keyword {
	case "title", "description", "default", "example", "examples", "contentMediaType":
		return nil // they demand nothing
	case "$ref":
		return d.broken(d.at(schema), value)
	case "items":
		return d.brokenElements(want.(jsonObject), value)
	case "properties", "additionalProperties":
		return d.brokenMembers(keyword, want, schema, value)
	case "anyOf", "allOf":
		return d.brokenParts(keyword, want.([]any), value)
	}
	ok, known := satisfies(keyword, want, value)
	if !known {
		d.t.Errorf("this test does not know the keyword %s", keyword)
	}
	if !ok && value != any(absent{}) {
		return fmt.Errorf("%s %.200v is broken by %.200v", keyword, want, value)
	}
	return nil
}

// brokenElements is broken for the elements of an array.
func (d *document) brokenElements(schema jsonObject, value any) error {
	errs := []error{d.broken(schema, absent{})}
	elements, _ := value.([]any)
	for _, element := range elements {
		errs = append(errs, d.broken(schema, element))
	}
	return errors.Join(errs...)
}

// brokenMembers is broken for the members of an object: those that the schema names, or the others.
func (d *document) brokenMembers(keyword string, want any, schema jsonObject, value any) error {
	var errs []error
	members, _ := value.(jsonObject)
	if keyword == "properties" {
		for name, property := range d.at(want) {
			member, given := members[name]
			if !given {
				member = absent{}
			}
			errs = append(errs, d.broken(property.(jsonObject), member))
		}
		return errors.Join(errs...)
	}
	errs = append(errs, d.broken(d.at(want), absent{}))
	for name, member := range members {
		if d.at(schema, "properties")[name] != nil {
			continue
		}
		if want == false {
			errs = append(errs, fmt.Errorf("there is the member %s, which is not described", name))
		}
		errs = append(errs, d.broken(d.at(want), member))
	}
	return errors.Join(errs...)
}

// brokenParts is broken for anyOf, of which one schema must hold, and allOf.
func (d *document) brokenParts(keyword string, parts []any, value any) error {
	var errs []error
	for _, part := range parts {
		errs = append(errs, d.broken(part.(jsonObject), value))
	}
	if keyword == "anyOf" && slices.Contains(errs, nil) {
		return nil
	}
	return errors.Join(errs...)
}

// satisfies says whether a value is as a keyword demands that looks at this value alone. Of others it says that it
// does not know them.
func satisfies(keyword string, want, value any) (ok, known bool) {
	text, isText := value.(string)
	size, sized := sizeOf(value)
	switch keyword {
	case "type":
		return hasType(want, value), true
	case "const":
		return value == want, true
	case "enum":
		return slices.Contains(want.([]any), value), true
	case "format":
		return !isText || hasFormat(want, text), true
	case "pattern":
		return !isText || regexp.MustCompile(want.(string)).MatchString(text), true
	case "minimum", "minLength", "minItems":
		return !sized || size >= want.(float64), true
	case "maximum", "maxLength", "maxItems":
		return !sized || size <= want.(float64), true
	case "required":
		return hasMembers(want.([]any), value), true
	}
	return false, false
}

// sizeOf is what a value's minimum and maximum are about: a number itself, the characters of a text, the elements of
// an array.
func sizeOf(value any) (size float64, sized bool) {
	switch value := value.(type) {
	case float64:
		return value, true
	case string:
		return float64(len([]rune(value))), true
	case []any:
		return float64(len(value)), true
	}
	return 0, false
}

// hasType says whether a value is of a type, or of one of several.
func hasType(want, value any) bool {
	allowed, several := want.([]any)
	if !several {
		allowed = []any{want}
	}
	switch value := value.(type) {
	case nil:
		return slices.Contains(allowed, any("null"))
	case bool:
		return slices.Contains(allowed, any("boolean"))
	case string:
		return slices.Contains(allowed, any("string"))
	case []any:
		return slices.Contains(allowed, any("array"))
	case jsonObject:
		return slices.Contains(allowed, any("object"))
	case float64:
		whole := value == math.Trunc(value)
		return slices.Contains(allowed, any("number")) || whole && slices.Contains(allowed, any("integer"))
	}
	return false
}

func hasFormat(want any, text string) bool {
	switch want {
	case "date-time":
		_, err := time.Parse(time.RFC3339, text)
		return err == nil
	case "uuid":
		return uuidPattern.MatchString(text)
	}
	return false
}

func hasMembers(names []any, value any) bool {
	members, isObject := value.(jsonObject)
	for _, name := range names {
		if _, given := members[name.(string)]; isObject && !given {
			return false
		}
	}
	return true
}

// check looks whether an answer to an operation, such as "GET /values", is as the document says.
func (d *document) check(t *testing.T, operation string, resp *http.Response, body string) {
	t.Helper()
	kind, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	d.seen[fmt.Sprint(operation, " ", resp.StatusCode, " ", kind)] = true
	described := d.at(d.operations[operation], "responses", strconv.Itoa(resp.StatusCode))
	var value any
	err := json.Unmarshal([]byte(body), &value)
	if err != nil && kind == "application/json" {
		t.Errorf("%s: no JSON: %q", operation, body)
	}
	if err != nil {
		value = body
	}
	schema := d.at(described, "content", kind, "schema")
	errs := []error{d.broken(schema, value)}
	for name, header := range d.at(described, "headers") {
		errs = append(errs, d.broken(d.at(header, "schema"), resp.Header.Get(name)))
	}
	if err := errors.Join(errs...); err != nil || len(schema) == 0 {
		t.Errorf("%s: the document does not describe status %d with %s: %v: %.500s",
			operation, resp.StatusCode, kind, err, body)
	}
}

// try sends a request, such as "GET /values?limit=1", and returns the body of the answer. It must have the status
// want and be as described.
func (d *document) try(
	t *testing.T, s *testServer, want int, request, key, body string, header ...string,
) string {
	t.Helper()
	method, path, _ := strings.Cut(request, " ")
	operation, _, _ := strings.Cut(request, "?")
	operation = ofOneRun.ReplaceAllString(operation, "/runs/{run_id}/")
	operation = ofOneFile.ReplaceAllString(operation, "/docs/{file}")
	resp, text, err := s.do(method, path, key, body, header...)
	if err != nil || resp.StatusCode != want {
		t.Fatalf("%s %.300s: %v %v %s, want %d", request, body, err, resp, text, want)
	}
	d.check(t, operation, resp, text)
	return text
}

var (
	ofOneRun  = regexp.MustCompile(`/runs/[^/]+/`)
	ofOneFile = regexp.MustCompile(`/docs/.+`)
)

// requestOf is an operation with the examples of its path parameters in their places.
func (d *document) requestOf(operation string) string {
	request := operation
	all, _ := d.operations[operation]["parameters"].([]any)
	for _, node := range all {
		parameter := d.at(node)
		if parameter["in"] == "path" {
			request = strings.Replace(request,
				"{"+parameter["name"].(string)+"}", parameter["example"].(string), 1)
		}
	}
	return request
}

// tryRaw sends bytes as they are; their answer must be as described.
func (d *document) tryRaw(t *testing.T, s *testServer, operation, request string) {
	t.Helper()
	conn := s.mustDial(t)
	io.WriteString(conn, request)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	d.check(t, operation, resp, string(body))
}

func TestDocumentListsTheRoutesAndWhatTheyNeed(t *testing.T) {
	d := mustDocument(t)
	routes, described := map[string]bool{}, map[string]bool{} // whether they are open
	for _, rt := range (&server{}).routes() {
		routes[strings.TrimSuffix(rt.pattern, "{$}")] = rt.access == open
	}
	for name, operation := range d.operations {
		security, own := operation["security"].([]any) // without its own the document's holds
		described[name] = own && len(security) == 0
	}
	if !reflect.DeepEqual(routes, described) {
		t.Errorf("the document describes %v; the routes are %v", described, routes)
	}
	if security := fmt.Sprint(d.root["security"]); security != "[map[ApiKey:[]]]" {
		t.Errorf("the document's security is %s", security)
	}
	versions := strings.Count(d.text, `"version": "`)
	if versions == 0 || versions != strings.Count(d.text, `"version": "`+release+`"`) {
		t.Errorf("the document is not of version %s", release)
	}
}

// Every answer that can be provoked must be described, and every answer that is described must be provoked.
func TestDocumentDescribesEveryAnswerAndNoOther(t *testing.T) {
	t.Parallel()
	d := mustDocument(t)
	s, key := mustTenant(t)
	d.tryRequests(t, s, key)
	d.tryRefusals(t, s, key)
	d.tryTooManyBadKeys(t, s)
	for operation, spec := range d.operations {
		for status, answer := range d.at(spec, "responses") {
			for kind := range d.at(answer, "content") {
				if !d.seen[operation+" "+status+" "+kind] {
					t.Errorf("%s is said to answer %s with %s, which it never did", operation, status, kind)
				}
			}
		}
	}
}

// tryRequests sends requests whose answers depend on what is stored, in an order that matters.
func (d *document) tryRequests(t *testing.T, s *testServer, key string) {
	named := `"run_id":"` + nobody + `",`
	params := runWith(named + `"run_params":{"n":[1]},"series_descriptions":null,`)
	twoRows := runWith("", at("2025-01-02", "null"), at("2025-01-03", "1e300", `,"valid_time_end":"2025-01-04"`))
	ofNoSeries := runWith("", `{"valid_time":"2025-01-01","series_id":"`+nobody+`","value":1}`)
	for _, c := range []struct {
		name          string
		status        int
		request, body string
	}{
		{"the root", 200, "GET /", ""},
		{"health", 200, "GET /healthz", ""},
		{"the page", 200, "GET /docs", ""},
		{"its styles", 200, "GET /docs/docs.css", ""},
		{"a script of it", 200, "GET /docs/api.js", ""},
		{"no file of it", 404, "GET /docs/nope", ""},
		{"the document itself", 200, "GET /openapi.json", ""},
		{"no series", 200, "GET /list_timeseries", ""},
		{"no runs", 200, "GET /runs", ""},
		{"no values", 200, "GET /values", ""},
		{"an upload", 200, "POST /upload", oneValue},
		{"an upload without rows", 200, "POST /upload", params},
		{"an upload with null and an interval", 200, "POST /upload", twoRows},
		{"a correction of everything", 200, "PUT /values", update(`"value":2.5,"annotation":"why","tags":["b","A"]`)},
		{"a correction of nothing new", 200, "PUT /values", update(`"value":2.5`)},
		{"a new series", 200, "POST /series", `{"name":"s","unit":"MW","description":"d"}`},
		{"a series that exists", 200, "POST /series", `{"name":"s","unit":"MW"}`},
		{"values", 200, "GET /values?limit=3", ""},
		{"values in detail", 200, "GET /values?detail=true", ""},
		{"all versions", 200, "GET /values?all_versions=1&mode=overlapping", ""},
		{"buckets", 200, "GET /values?bucket=1h&agg=count", ""},
		{"local months with several aggregates", 200, "GET /values?bucket=P1M&tz=Asia/Tokyo&agg=last&agg=mean&agg=sum", ""},
		{"the same as CSV", 200, "GET /values?bucket=P1M&tz=Asia/Tokyo&agg=last&agg=mean&agg=sum&format=csv", ""},
		{"values known a day ahead", 200, "GET /values?days_ahead=1&time_of_day=12:00&tz=Europe/Berlin", ""},
		{"CSV in detail", 200, "GET /values?format=csv&detail=true", ""},
		{"overlapping CSV", 200, "GET /values?mode=overlapping&format=csv", ""},
		{"series", 200, "GET /list_timeseries", ""},
		{"runs", 200, "GET /runs", ""},
		{"an upload to no series", 404, "POST /upload", ofNoSeries},
		{"the latest values by a pattern", 200, "GET /values?latest=true&match=*&detail=true", ""},
		{"what is stored of series", 200, "GET /list_timeseries?stats=true", ""},
		{"runs of a series", 200, "GET /runs?series_key=load&limit=1", ""},
		{"runs of no series", 404, "GET /runs?series_key=nope", ""},
		{"values of no run", 404, "GET /values?run_id=" + tenantB, ""},
		{"values of no series", 404, "GET /values?series_key=nope", ""},
		{"a correction of no series", 404, "PUT /values", strings.Replace(update(`"value":1`), "load", "nope", 1)},
		{"a run_id that is taken", 409, "POST /upload", runWith(named, at("2025-01-01", "1"))},
		{"a series in another unit", 409, "POST /series", `{"name":"s","unit":"kW"}`},
		{"corrections", 200, "GET /corrections", ""},
		{"corrections as CSV", 200, "GET /corrections?format=csv", ""},
		{"corrections of no series", 404, "GET /corrections?series_key=nope", ""},
		{"a withdrawal", 200, "POST /runs/" + nobody + "/withdraw", ""},
		{"a withdrawal with an annotation", 200, "POST /runs/" + nobody + "/withdraw", `{"annotation":"x"}`},
		{"a withdrawal of no run", 404, "POST /runs/" + tenantB + "/withdraw", ""},
		{"a correction of a withdrawn run", 409, "PUT /values", update(named + `"value":1`)},
		{"runs, one of them withdrawn", 200, "GET /runs", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			d.try(t, s, c.status, c.request, key, c.body)
		})
	}
	for _, operation := range []string{"GET /values", "GET /corrections", "GET /runs", "GET /list_timeseries"} {
		t.Run("HTTP/1.0 of "+operation, func(t *testing.T) {
			d.tryRaw(t, s, operation, operation+" HTTP/1.0\r\nX-API-Key: "+key+"\r\n\r\n")
		})
	}
}

// tryRefusals provokes the refusals that every operation with a key has in common, and those of every one with a
// body.
func (d *document) tryRefusals(t *testing.T, s *testServer, key string) {
	readOnly, _ := mustRun(t, 0, s.dsn, "",
		"users", "create", "-q", "--read-only", "-t", tenantA, "-e", "r@example.com")
	readOnly = strings.TrimSpace(readOnly)
	down := serverWithoutDatabase(t, io.EOF, 0, io.Discard)
	confused := serverWithoutDatabase(t, errors.New("a bug"), 0, io.Discard)
	bug := serverWithoutDatabase(t, nil, 0, io.Discard)
	hasty := serverWithoutDatabase(t, nil, 100*time.Millisecond, io.Discard)
	d.try(t, down, 503, "GET /healthz", "", "")
	d.try(t, confused, 500, "GET /healthz", "", "")
	bodies := map[string]string{
		"POST /upload": oneValue,
		"PUT /values":  update(`"value":1`),
		"POST /series": `{"name":"x"}`,

		"POST /runs/{run_id}/withdraw": `{"annotation":"x"}`,
	}
	tooLarge := gzipped(`{"` + strings.Repeat("x", maxBody)) // one long name: it is read the fastest
	for operation, spec := range d.operations {
		if spec["security"] != nil {
			continue // it needs no key
		}
		body := bodies[operation]
		request := d.requestOf(operation)
		t.Run("refusals of "+operation, func(t *testing.T) {
			d.try(t, s, 401, request, "", body)
			d.try(t, s, 403, request+"?tenant_id="+tenantB, key, body)
			d.try(t, s, 422, request+"?nope=1", key, body)
			d.try(t, bug, 500, request, "", body)
			d.try(t, down, 503, request, "", body)
		})
		if body == "" {
			t.Run("a long URL of "+operation, func(t *testing.T) {
				d.try(t, s, 414, operation+"?match="+strings.Repeat("x", maxURL), key, "")
			})
			continue
		}
		t.Run("refusals of a body of "+operation, func(t *testing.T) {
			d.try(t, s, 403, request, readOnly, body)
			d.try(t, s, 413, request, key, tooLarge, "Content-Encoding: gzip")
			d.try(t, s, 415, request, key, body, "Content-Type: text/plain")
			d.tryRaw(t, hasty, operation, request+" HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"+
				"Content-Length: 9\r\n\r\n{") // and then nothing
		})
	}
}

// tryTooManyBadKeys sends bad keys to every operation that needs one until it answers 429.
func (d *document) tryTooManyBadKeys(t *testing.T, s *testServer) {
	for operation, spec := range d.operations {
		if spec["security"] != nil {
			continue // it needs no key
		}
		method, path, _ := strings.Cut(d.requestOf(operation), " ")
		for range 3 * failureBurst {
			if d.seen[operation+" 429 application/json"] {
				break
			}
			resp, text, err := s.do(method, path, "x", "")
			if err != nil {
				t.Fatal(err)
			}
			d.check(t, operation, resp, text)
		}
	}
}

// examples calls fn with each example and default under a node, and with its schema.
func (d *document) examples(node any, fn func(schema jsonObject, example any)) {
	members, _ := node.(jsonObject)
	ofSchema, _ := members["examples"].([]any)
	for _, example := range ofSchema {
		fn(members, example)
	}
	if standard, given := members["default"]; given {
		fn(members, standard)
	}
	if schema := d.at(members["schema"]); len(schema) > 0 { // of a parameter, a header or a body
		several := d.at(members, "examples")
		if example, given := members["example"]; given || len(several) == 0 {
			fn(schema, example)
		}
		for _, example := range several {
			fn(schema, d.at(example)["value"])
		}
	}
	for _, member := range members {
		d.examples(member, fn)
	}
	elements, _ := node.([]any)
	for _, element := range elements {
		d.examples(element, fn)
	}
}

func TestExamplesOfTheDocumentFitTheirSchemas(t *testing.T) {
	d, count := mustDocument(t), 0
	d.examples(d.root, func(schema jsonObject, example any) {
		count++
		if err := d.broken(schema, example); err != nil {
			t.Errorf("the example %.200v does not fit its schema: %v", example, err)
		}
	})
	if count < 80 {
		t.Errorf("only %d examples were found", count)
	}
}

var variesInAnswers = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f-]{27}|"(change_time|inserted_at|withdrawn_at|last_change_time|value_id)":[^,}]*`)

// essence is what two answers to one request must have in common: everything but ids and times of writing. It is cut
// into sorted parts, because members may be in any order.
func essence(answer any) []string {
	constant := variesInAnswers.ReplaceAllString(asJSON(answer), "")
	parts := strings.FieldsFunc(constant, func(r rune) bool { return strings.ContainsRune("{},", r) })
	slices.Sort(parts)
	return parts
}

// exchange is a request of the document's examples and the answer that is shown for it.
type exchange struct {
	request, kind, name string // kind is the media type: of the body in a write, of the answer in a read
	query               jsonObject
	body, shown         any
}

// exchanges are the document's examples of requests, in no order.
func (d *document) exchanges() (writes, reads []exchange) {
	for request, spec := range d.operations {
		answers := d.at(spec, "responses", "200", "content")
		for kind, content := range d.at(spec, "requestBody", "content") {
			for name, node := range d.at(content, "examples") {
				example, shown := d.at(node), d.at(answers, "application/json", "examples", name)
				writes = append(writes,
					exchange{request, kind, name, d.at(example["x-query"]), example["value"], shown["value"]})
			}
		}
		if !strings.HasPrefix(request, "GET ") {
			continue
		}
		for kind, content := range answers {
			for name, node := range d.at(content, "examples") {
				shown := d.at(node)
				reads = append(reads, exchange{request, kind, name, d.at(shown["x-query"]), nil, shown["value"]})
			}
		}
	}
	return writes, reads
}

// send sends the request of an example, as the document tells it, and returns its answer.
func (x exchange) send(t *testing.T, d *document, s *testServer, key string) (answer any) {
	t.Helper()
	query := url.Values{}
	for name, value := range x.query {
		switch value := value.(type) {
		case string:
			query.Set(name, value)
		case []any: // a parameter that is repeated
			for _, text := range value {
				query.Add(name, text.(string))
			}
		}
	}
	body := ""
	switch value := x.body.(type) {
	case string:
		body = value // CSV
	case jsonObject:
		body = asJSON(value)
	}
	request := d.requestOf(x.request) + "?" + query.Encode()
	text := d.try(t, s, 200, request, key, body, "Content-Type: "+x.kind)
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		return text // CSV
	}
	return answer
}

// The examples of requests are sent in the order in which they stand, as a reader of the docs page would send them.
// Then the reads are sent again, because the answers that are shown are those after all writes. x-query tells the
// parameters.
func TestExamplesOfTheDocumentAreAnsweredAsItShows(t *testing.T) {
	t.Parallel()
	d, s := mustDocument(t), mustServer(t)
	key := s.mustUser(t, "3b241101-e2bb-4255-8caf-4136c566a962", "anna@example.com")
	writes, reads := d.exchanges()
	if len(writes) < 6 || len(reads) < 6 {
		t.Errorf("only %d writes and %d reads were found", len(writes), len(reads))
	}
	place := func(x exchange) int { return strings.Index(d.text, strconv.Quote(x.name)+":") }
	all := slices.Concat(writes, reads)
	slices.SortFunc(all, func(x, y exchange) int { return place(x) - place(y) })
	for _, x := range all {
		t.Run(x.request+", "+x.name, func(t *testing.T) {
			answer := x.send(t, d, s, key)
			if x.body != nil && !slices.Equal(essence(answer), essence(x.shown)) {
				t.Errorf("%v\nthe document shows %v", answer, x.shown)
			}
		})
	}
	for _, x := range reads {
		t.Run(x.request+", "+x.name+", after all writes", func(t *testing.T) {
			answer := x.send(t, d, s, key)
			if !slices.Equal(essence(answer), essence(x.shown)) {
				t.Errorf("%v\nthe document shows %v", answer, x.shown)
			}
		})
	}
}

// When the server refuses a parameter, a field or a column that it does not know, it names those that it takes.
func TestDocumentNamesTheParametersAndFieldsThatThereAre(t *testing.T) {
	t.Parallel()
	d := mustDocument(t)
	s, key := mustTenant(t)
	const inJSON, inCSV = "application/json", "text/csv"
	for _, c := range []struct{ name, request, body, kind, schema string }{ // without a schema it is about parameters
		{"parameters of GET /values", "GET /values?nope=1", "", inJSON, ""},
		{"parameters of GET /runs", "GET /runs?nope=1", "", inJSON, ""},
		{"parameters of GET /list_timeseries", "GET /list_timeseries?nope=1", "", inJSON, ""},
		{"parameters of POST /upload", "POST /upload?nope=1", "x", inCSV, ""},
		{"parameters of PUT /values", "PUT /values?nope=1", `{"updates":[]}`, inJSON, ""},
		{"parameters of POST /series", "POST /series?nope=1", `{"name":"x"}`, inJSON, ""},
		{"members of an upload", "POST /upload", `{"nope":1}`, inJSON, "Upload"},
		{"columns of an upload", "POST /upload?run_start_time=2025-01-01", "nope", inCSV, "UploadRow"},
		{"members of updates", "PUT /values", `{"nope":1}`, inJSON, "Updates"},
		{"members of one update", "PUT /values", `{"updates":[{"nope":1}]}`, inJSON, "Update"},
		{"members of a series", "POST /series", `{"nope":1}`, inJSON, "NewSeries"},
		{"parameters of GET /corrections", "GET /corrections?nope=1", "", inJSON, ""},
		{"parameters of a withdrawal", "POST /runs/" + nobody + "/withdraw?nope=1", `{}`, inJSON, ""},
		{"members of a withdrawal", "POST /runs/" + nobody + "/withdraw", `{"nope":1}`, inJSON, "NewWithdrawal"},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := d.try(t, s, 422, c.request, key, c.body, "Content-Type: "+c.kind)
			_, taken, _ := strings.Cut(strings.ReplaceAll(text, "also ", ""), "there are ")
			operation, _, _ := strings.Cut(c.request, "?")
			names := d.parameters(ofOneRun.ReplaceAllString(operation, "/runs/{run_id}/"))
			if c.schema != "" {
				properties := d.at(d.root, "components", "schemas", c.schema, "properties")
				names = slices.Collect(maps.Keys(properties))
			}
			slices.Sort(names)
			if described := strings.Join(names, ", "); described+"\"}\n" != taken {
				t.Errorf("the document names %s\nthe server takes %s", described, taken)
			}
		})
	}
}

// parameters are the names of an operation's parameters in the query string.
func (d *document) parameters(operation string) []string {
	var names []string
	all, _ := d.operations[operation]["parameters"].([]any)
	for _, node := range all {
		parameter := d.at(node)
		if parameter["in"] == "query" {
			names = append(names, parameter["name"].(string))
		}
	}
	return names
}

// ---- README.md and docs/

// mustReference returns docs/REFERENCE.md.
func mustReference(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("docs/REFERENCE.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// sectionOf returns what follows a heading, such as "## Statuses", up to the next one of its level or above.
func sectionOf(text, heading string) string {
	_, section, _ := strings.Cut(text, "\n"+heading+"\n")
	level := strings.IndexByte(heading, ' ')
	next := regexp.MustCompile(fmt.Sprintf(`(?m)^#{1,%d} `, level)).FindStringIndex(section)
	if next != nil {
		section = section[:next[0]]
	}
	return section
}

var inBackticks = regexp.MustCompile("`([^`]*)`")

// firstCells returns what stands in backticks in the first cells of the tables of a section that have this title in
// their first cell, sorted.
func firstCells(section, title string) []string {
	var names []string
	isOurs := false
	for line := range strings.Lines(section) {
		cell, isRow := strings.CutPrefix(line, "| ")
		cell, _, _ = strings.Cut(cell, " | ")
		switch {
		case !isRow:
			isOurs = isOurs && strings.HasPrefix(line, "|---")
		case cell == title:
			isOurs = true
		case isOurs:
			for _, name := range inBackticks.FindAllStringSubmatch(cell, -1) {
				names = append(names, name[1])
			}
		}
	}
	slices.Sort(names)
	return names
}

func expectSame(t *testing.T, what string, told, want []string) {
	t.Helper()
	slices.Sort(want)
	if !slices.Equal(told, want) {
		t.Errorf("%s: the reference has %q, want %q", what, told, want)
	}
}

// docs/REFERENCE.md has each route with exactly its parameters, fields and statuses.
func TestReferenceFitsTheDocument(t *testing.T) {
	d := mustDocument(t)
	text := mustReference(t)
	expectSame(t, "routes", firstCells(sectionOf(text, "## Routes"), "route"), slices.Collect(maps.Keys(d.operations)))
	openRoutes := sectionOf(text, "### Open routes")
	for operation, described := range d.operations {
		t.Run(operation, func(t *testing.T) {
			section := sectionOf(text, "### `"+operation+"`")
			given := regexp.MustCompile(`(?m)^Statuses: (.*)$`).FindStringSubmatch(section)
			if section == "" {
				row := fmt.Sprintf("(?m)^\\| `%s` \\|.*\\| (.*) \\|$", regexp.QuoteMeta(operation))
				given = regexp.MustCompile(row).FindStringSubmatch(openRoutes)
			}
			if given == nil {
				t.Fatal("the reference has no statuses of it")
			}
			answers := slices.Collect(maps.Keys(d.at(described, "responses")))
			expectSame(t, "statuses", strings.Split(given[1], ", "), answers)
			// What every request may have stands in one place.
			names := slices.DeleteFunc(d.parameters(operation), func(name string) bool { return name == "tenant_id" })
			expectSame(t, "parameters", firstCells(section, "parameter"), names)
		})
	}
	for _, c := range []struct{ operation, title, schema string }{
		{"POST /upload", "field", "Upload"},
		{"POST /upload", "field of a row", "UploadRow"},
		{"PUT /values", "field of an update", "Update"},
		{"POST /series", "field", "NewSeries"},
		{"POST /runs/{run_id}/withdraw", "field", "NewWithdrawal"},
	} {
		t.Run(c.schema, func(t *testing.T) {
			properties := d.at(d.root, "components", "schemas", c.schema, "properties")
			told := firstCells(sectionOf(text, "### `"+c.operation+"`"), c.title)
			expectSame(t, "fields", told, slices.Collect(maps.Keys(properties)))
		})
	}
}

// Every status that the program may send has a row in docs/REFERENCE.md.
func TestReferenceListsEveryStatus(t *testing.T) {
	want := []string{"200", "500"}
	for _, status := range statuses {
		want = append(want, strconv.Itoa(status))
	}
	slices.Sort(want)
	var told []string
	for _, row := range regexp.MustCompile(`(?m)^\| (\d+) \|`).FindAllStringSubmatch(mustReference(t), -1) {
		told = append(told, row[1])
	}
	expectSame(t, "statuses", told, slices.Compact(want))
}

// The README is for newcomers: what is longer belongs into docs/.
func TestReadmeIsShort(t *testing.T) {
	const most = 250
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	if lines := strings.Count(string(text), "\n"); lines > most {
		t.Errorf("README.md has %d lines, more than %d", lines, most)
	}
}

// anchors returns the names by which links find the headings of a document.
func anchors(text string) map[string]bool {
	found := map[string]bool{}
	for _, heading := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(text, -1) {
		name := strings.ReplaceAll(strings.ToLower(heading[1]), " ", "-")
		found[regexp.MustCompile(`[^\pL\pN_-]`).ReplaceAllString(name, "")] = true
	}
	return found
}

// What a document links to within the repository is there. The picture is made by a program that needs a browser.
func TestLinksOfTheDocumentsLeadSomewhere(t *testing.T) {
	documents, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, document := range append(documents, "README.md") {
		t.Run(document, func(t *testing.T) {
			text, err := os.ReadFile(document)
			if err != nil {
				t.Fatal(err)
			}
			for _, link := range regexp.MustCompile(`\]\(([^)]*)\)`).FindAllStringSubmatch(string(text), -1) {
				file, anchor, _ := strings.Cut(link[1], "#")
				if strings.Contains(file, "://") || file == "docs/explore.png" {
					continue
				}
				target := filepath.Join(filepath.Dir(document), file)
				if file == "" {
					target = document
				}
				linked, err := os.ReadFile(target)
				if err != nil {
					t.Error(err)
				} else if anchor != "" && !anchors(string(linked))[anchor] {
					t.Errorf("%s has no heading for #%s", target, anchor)
				}
			}
		})
	}
}

// docs/TROUBLESHOOTING.md quotes what the program prints; … stands for what differs.
func TestTroubleshootingQuotesWhatIsPrinted(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("docs/TROUBLESHOOTING.md")
	if err != nil {
		t.Fatal(err)
	}
	printed := commandErrors(t) + requestErrors(t)
	for _, block := range regexp.MustCompile("(?ms)^```\n(.*?)^```").FindAllStringSubmatch(string(text), -1) {
		for line := range strings.Lines(block[1]) {
			pattern := strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSpace(line)), "…", ".+")
			if !regexp.MustCompile("(?m)^" + pattern + "$").MatchString(printed) {
				t.Errorf("nothing that was tried prints %q; it prints:\n%s", line, printed)
			}
		}
	}
}

// commandErrors returns what commands print when they fail for each of the reasons in docs/TROUBLESHOOTING.md.
func commandErrors(t *testing.T) string {
	_, _, printed := runIn(nil, "", "users", "list")
	dsn := mustDatabase(t)
	wrongPassword := mustParse(t, dsn)
	wrongPassword.User = url.UserPassword(wrongPassword.User.Username(), "wrong")
	withTLS := mustParse(t, dsn)
	withTLS.RawQuery = "sslmode=require"
	for _, refused := range []*url.URL{wrongPassword, withTLS} {
		if mustOpen(t, refused.String()).Ping() == nil {
			t.Skip("this PostgreSQL asks for no password, or has TLS: it does not print what others do")
		}
	}
	for _, dsn := range []string{unreachable, wrongPassword.String(), withTLS.String(), dsn} {
		_, stderr := mustRun(t, 1, dsn, "", "users", "list")
		printed += stderr
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	_, stderr := mustRun(t, 1, dsn, "", "api", "--port", port)
	printed += stderr
	mustRun(t, 0, dsn, "", "create", "tables", "-y")
	mustExec(t, mustOpen(t, dsn), `COMMENT ON TABLE runs_table IS 'timedb schema 99'`)
	_, stderr = mustRun(t, 1, dsn, "", "api")
	return printed + stderr
}

// requestErrors returns how requests are refused for each of the reasons in docs/TROUBLESHOOTING.md.
func requestErrors(t *testing.T) string {
	s, key := mustTenant(t)
	mayRead, _ := mustRun(t, 0, s.dsn, "", "keys", "create", "-e", "a@example.com", "--name", "r", "--read-only", "-q")
	away := serverWithoutDatabase(t, errors.New("away"), 0, io.Discard)
	s.must(t, 200, "POST", "/series", key, `{"name": "wind_mw"}`)
	var printed strings.Builder
	for _, c := range []struct {
		s                              *testServer
		status                         int
		method, path, key, kind, input string
	}{
		{s, 401, "GET", "/values", "", "", ""},
		{s, 401, "GET", "/values", "tdb_x", "", ""},
		{s, 403, "POST", "/upload", strings.TrimSpace(mayRead), "", ""},
		{s, 403, "GET", "/values?tenant_id=" + nobody, key, "", ""},
		{s, 404, "GET", "/values?series_key=solar_mw", key, "", ""},
		{s, 404, "GET", "/values?series_key=wind_mw&as_of=2025-01-01", key, "", ""},
		{s, 404, "POST", "/upload", key, "application/json",
			`{"create_series": false, "value_rows": [{"valid_time": "2025-01-01", "value_key": "wind_nw", "value": 1}]}`},
		{s, 422, "POST", "/upload", key, "application/json",
			`{"value_rows": [{"valid_time": "01.02.2025", "value_key": "wind_mw", "value": 1}]}`},
		{s, 422, "POST", "/upload", key, "application/json",
			`{"value_rows": [{"valid_time": "2025-10-26T02:00", "value_key": "load", "value": 1},
			{"valid_time": "2025-10-26T02:00", "value_key": "load", "value": 2}]}`},
		{s, 422, "POST", "/upload", key, "application/json",
			`{"value_rows": [{"valid_time": "2025-01-01", "value_key": "wind_mw", "value": NaN}]}`},
		{s, 422, "POST", "/upload", key, "text/csv", "valid_time;value_key;value\n2025-01-01;wind_mw;1\n"},
		{s, 422, "POST", "/upload", key, "text/csv", "valid_time,value_key,value\n2025-01-01,wind_mw,\"1,5\"\n"},
		{s, 422, "POST", "/upload", key, "text/csv", ",valid_time,value_key,value\n0,2025-01-01,wind_mw,1\n"},
		{away, 503, "GET", "/values", "", "", ""},
	} {
		printed.WriteString(c.s.must(t, c.status, c.method, c.path, c.key, c.input, "Content-Type: "+c.kind))
	}
	// A server that is busy is in faults_test.go; here it is enough that these are its words.
	source, err := os.ReadFile("store.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, found := range regexp.MustCompile(`refuse\(busy, "(.*)"\)`).FindAllSubmatch(source, -1) {
		fmt.Fprintf(&printed, "{\"detail\":\"%s\"}\n", found[1])
	}
	return printed.String()
}

// ---- Benchmarks

// uploadBodies are rows as the notebooks' pandas writes them: ten series, one after the other, in quarters of an
// hour.
func uploadBodies(rows int) (jsonBody, csvBody string) {
	begin := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	var objects []string
	lines := []byte("valid_time,value_key,value\n")
	for i := range rows {
		valid := begin.Add(time.Duration(i%(rows/10)) * 15 * time.Minute)
		key := fmt.Sprintf("series_%d", i/(rows/10))
		value := 80 + float64(i*7919%40_000)/1000
		objects = append(objects, fmt.Sprintf(`{"valid_time":%q,"value_key":%q,"value":%g}`,
			valid.Format("2006-01-02T15:04:05+00:00"), key, value))
		lines = fmt.Appendf(lines, "%s,%s,%g\n", valid.Format("2006-01-02 15:04:05+00:00"), key, value)
	}
	return runWith("", objects...), string(lines)
}

// benchmarkUpload uploads a body, which has so many rows, again and again.
func benchmarkUpload(b *testing.B, rows int, path, body string, header ...string) {
	s, key := mustTenant(b)
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
	s, key := mustTenant(b)
	const n = 1_000_000
	mustManyValues(b, s, key, n)
	benchmarkRead(b, s, key, "/values", n)
}

// BenchmarkReadRevisions reads hourly forecasts, each of a week ahead in quarters of an hour: the latest, and the
// latest that was known at noon of the day before.
func BenchmarkReadRevisions(b *testing.B) {
	s, key := mustTenant(b)
	const series, runs, values = 20, 168, 672
	begin := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	for run := range runs {
		known := begin.Add(time.Duration(run) * time.Hour)
		text := fmt.Appendf(nil, `{"run_start_time":%[1]q,"known_time":%[1]q,"value_rows":[`,
			known.Format(time.RFC3339))
		for i := range series * values {
			text = fmt.Appendf(text, `{"value_key":"load%d","valid_time":%q,"value":%d.5},`, i/values,
				known.Add(time.Duration(i%values)*15*time.Minute).Format(time.RFC3339), run)
		}
		s.must(b, 200, "POST", "/upload", key, string(text[:len(text)-1])+"]}")
	}
	for _, c := range []struct{ name, path string }{
		{"flat", "/values"},
		{"gate", "/values?days_ahead=1&time_of_day=12:00&tz=Europe/Berlin"},
	} {
		b.Run(c.name, func(b *testing.B) {
			benchmarkRead(b, s, key, c.path, series*runs*values)
		})
	}
}

// BenchmarkReadYears reads fifty years of hourly values: as they are, and by the months of a zone.
func BenchmarkReadYears(b *testing.B) {
	s, key := mustTenant(b)
	const n = 50 * 365 * 24
	lines := []byte("valid_time,value_key,value\n")
	for i := range n {
		valid := time.Date(1975, 1, 1, i, 0, 0, 0, time.UTC)
		lines = fmt.Appendf(lines, "%s,load,%d.5\n", valid.Format("2006-01-02T15:04Z"), i)
	}
	s.must(b, 200, "POST", "/upload?run_start_time=2025-01-01", key, string(lines), "Content-Type: text/csv")
	for _, c := range []struct{ name, path string }{
		{"raw", "/values"},
		{"hours", "/values?bucket=24h&agg=mean"},
		{"days", "/values?bucket=P1D&agg=mean&tz=Europe/Berlin"},
		{"months", "/values?bucket=P1M&agg=mean&tz=Europe/Berlin"},
	} {
		b.Run(c.name, func(b *testing.B) {
			benchmarkRead(b, s, key, c.path, n)
		})
	}
}

// benchmarkRead reads what is at a path, for which n stored values are looked at.
func benchmarkRead(b *testing.B, s *testServer, key, path string, n int) {
	b.ReportAllocs()
	for b.Loop() {
		r, _ := http.NewRequest("GET", s.url+path, nil)
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
	s, key := mustTenant(b)
	mustManyValues(b, s, key, 100_000)
	const hour = "/values?series_key=load&start_valid=2020-02-01T00:00:00Z&end_valid=2020-02-01T01:00:00Z"
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			resp, _, err := s.do("GET", hour, key, "")
			if err != nil || resp.StatusCode != 200 {
				b.Error(resp, err)
			}
		}
	})
}

// ---- Fuzzing of what a request's body can be

func FuzzUploadCSV(f *testing.F) {
	for _, seed := range []string{
		"valid_time,value_key,value\n2025-01-01,load,1\n2025-01-02,load,\n",
		"value,series_id,valid_time\n",
		"valid_time,value_key,value,valid_time_end\r\n\"2025-01-01 00:00\",\"a\"\"b\",NaN,2025-01-02\r\n",
		"valid_time,value\n1\n",
		"valid_time,series_key,value,value_key\n2025-01-01, a ,1,a\n\n2025-01-01,a,1,\n",
		"\"",
		"",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		u := newUploadReader(t)
		err := u.readCSV(bytes.NewReader(body), &parameters{}, Caller{})
		if err != nil {
			mustBeRefusal(t, body, err, invalidInput)
			return
		}
		lines, err := csv.NewReader(bytes.NewReader(body)).ReadAll()
		if err != nil || len(lines) != u.rows+1 {
			t.Fatalf("%d rows of %q, encoding/csv finds %d lines: %v", u.rows, body, len(lines), err)
		}
	})
}

func FuzzUpdates(f *testing.F) {
	for _, seed := range []string{
		`{"valid_time":"2025-01-01","series_key":"a","value":1}`,
		`{"valid_time":"2025-01-01","series_id":null,"tags":["B","a "]}`,
		`{"value":null,"value":1}`,
		`{"valid_time":"2025-01-01T00:00Z","valid_time_end":null,"series_key":"x","annotation":" y "}`,
		`{"Value":1}`,
		`[]`,
		`{`,
	} {
		f.Add([]byte(`{"updates":[` + seed + `]}`))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		b := &body{in: bytes.NewReader(text), digest: sha256.New()}
		readUpdates := func() error {
			return eachItem(b.json, '[', func(int) error {
				x, err := readUpdate(b.json, Caller{tenant: tenantA})
				if err == nil && (x.ref == seriesRef{} || x.point.time == 0) {
					t.Errorf("%q is read as %v", text, x)
				}
				return err
			})
		}
		if err := b.decodeJSON(map[string]any{"updates": readUpdates}); err != nil {
			mustBeRefusal(t, text, err, invalidInput, forbidden)
		}
	})
}

// ampleClaim is a claim on more memory than any test takes.
func ampleClaim() *claim { return &claim{of: newShares(1<<40, 1<<40)} }

// newUploadReader reads an upload as POST /upload does, without a database.
func newUploadReader(t testing.TB) *uploadReader {
	u := &uploadReader{ctx: t.Context(), memory: ampleClaim()}
	u.series = map[seriesRef]*seriesRows{}
	return u
}

// mustBeRefusal fails the test unless err says, to whoever sent text, that it is wrong.
func mustBeRefusal(t *testing.T, text []byte, err error, kinds ...errorKind) {
	t.Helper()
	refused, ok := errors.AsType[*refusal](err)
	if !ok || !slices.Contains(kinds, refused.kind) {
		t.Errorf("%q: %v, want a refusal of the kinds %q", text, err, kinds)
	}
}

func FuzzUploadJSON(f *testing.F) {
	params := runWith(`"run_params":{"a":[{}]},`, at("2025-01-01", "null"))
	const keys = `{"create_series":false,"value_rows":[{"valid_time":"2025-01-01","value_key":" a ","series_key":"a","value":1}]}`
	for _, seed := range []string{emptyRun, oneValue, params, keys, `{"value_rows":[{},]}`, `{} {`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		u := newUploadReader(t)
		b := &body{in: bytes.NewReader(text), digest: sha256.New()}
		err := u.readJSON(b, &parameters{}, Caller{})
		if err == nil {
			var plain struct {
				Rows []json.RawMessage `json:"value_rows"`
			}
			if err := json.Unmarshal(text, &plain); err != nil || len(plain.Rows) != u.rows {
				t.Fatalf("%d rows of %q, encoding/json finds %d: %v", u.rows, text, len(plain.Rows), err)
			}
			err = u.check()
		}
		if err != nil {
			mustBeRefusal(t, text, err, invalidInput, forbidden, tooLarge)
		}
	})
}
