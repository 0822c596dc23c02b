package main

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	_ "embed"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/lib/pq"
)

//go:embed schema.sql
var schemaSQL string

const (
	// A block is one row of values_table; schema.sql checks both bounds. 1,000 values make a row's overhead (some 200
	// bytes) vanish beside them; 32 days bound how far before a window the read of that window must start.
	maxBlockValues = 1000
	maxBlockSpan   = micros(32 * 24 * time.Hour / time.Microsecond)

	blocksPerStatement = 250 // so that the parameters of one INSERT stay within some megabytes
	// poolSize connections keep a database of a dozen cores busy; several servers fit PostgreSQL's default of 100.
	poolSize         = 24
	connMaxLifetime  = 30 * time.Minute // retires a connection that went bad
	connectTimeout   = 5 * time.Second
	statementTimeout = 5 * time.Minute // PostgreSQL ends a statement of the API then, whatever became of its server
)

// store is all of timedb's SQL. A method that touches tenant data takes the Caller first after ctx and binds its tenant.
type store struct {
	db         *sql.DB
	schema     string
	statements sync.Map // of *sql.Stmt by query
}

var errBadDSN = errors.New("the DSN cannot be read: expected postgresql://user:password@host:port/database (percent-encode " +
	"reserved characters of the password) or key=value pairs")

// openStore prepares a pool of connections that see schema alone; it does not connect yet. timeout ends a statement on
// the database's side; 0 means never. An error never holds any part of the DSN, as lib/pq's would.
func openStore(dsn, schema string, timeout time.Duration) (*store, error) {
	if os.Getenv("PGSERVICE") != "" {
		return nil, errors.New("PGSERVICE is set and would override the DSN: unset it")
	}
	cfg, err := pq.NewConfig(dsn)
	if err != nil || strings.ContainsAny(cfg.Database, "@/?#") || strings.ContainsAny(cfg.Host, "@?#") {
		return nil, errBadDSN // a reserved character in the password has shifted what follows it
	}
	cfg.SSLMode = cmp.Or(cfg.SSLMode, pq.SSLModePrefer) // as libpq does; lib/pq would require TLS
	cfg.ConnectTimeout = cmp.Or(cfg.ConnectTimeout, connectTimeout)
	cfg.ApplicationName = cmp.Or(cfg.ApplicationName, "timedb")
	cfg.BinaryParameters = true
	cfg.TZ = "UTC"
	cfg = cfg.Clone()                                                     // with room for parameters of the session
	cfg.Runtime["search_path"] = pq.QuoteIdentifier(schema) + ", pg_temp" // last, or a temporary table could stand in for ours
	cfg.Runtime["plan_cache_mode"] = "force_generic_plan"                 // or lists are planned for anew each time
	cfg.Runtime["statement_timeout"] = fmt.Sprint(timeout.Milliseconds())
	cfg.Runtime["idle_in_transaction_session_timeout"] = "60000" // a vanished client must not keep its locks
	connector, err := pq.NewConnectorConfig(cfg)
	if err != nil {
		return nil, errBadDSN
	}
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(poolSize)
	db.SetMaxIdleConns(poolSize)
	db.SetConnMaxLifetime(connMaxLifetime)
	return &store{db: db, schema: schema}, nil
}

// isLoopback tells whether host, a name or an address without port, is this machine.
func isLoopback(host string) bool {
	return host == "localhost" || net.ParseIP(host).IsLoopback()
}

// querier is a transaction, or the store outside of one.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// QueryContext runs query as a statement that database/sql prepares once per connection. That saves planning what every
// request runs, and lib/pq receives bytea in binary only from prepared statements.
func (s *store) QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	st, known := s.statements.Load(query)
	if !known {
		prepared, err := s.db.PrepareContext(ctx, query)
		if err != nil {
			return nil, err
		}
		st, _ = s.statements.LoadOrStore(query, prepared)
	}
	return st.(*sql.Stmt).QueryContext(ctx, args...)
}

// scanAll reads every row into a T, whose fields' addresses are what fields returns, and closes rows.
func scanAll[T any](rows *sql.Rows, err error, fields func(*T) []any) ([]T, error) {
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	all := []T{}
	for rows.Next() {
		var one T
		if err := rows.Scan(fields(&one)...); err != nil {
			return nil, err
		}
		all = append(all, one)
	}
	return all, rows.Err()
}

// inTx runs fn in one transaction and commits when fn returns nil. Otherwise, or when fn panics, nothing is stored. An
// error of the commit itself leaves open whether it took effect: that is what a client's own run_id is for.
func (s *store) inTx(ctx context.Context, fn func(*sql.Tx) error) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() // after the commit it does nothing
	if err := fn(tx); err != nil {
		return err
	}
	return tx.Commit()
}

// exec runs query in a transaction of its own; without args it may hold several statements.
func (s *store) exec(ctx context.Context, query string, args ...any) error {
	return s.inTx(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, query, args...)
		return err
	})
}

// nullable is the bound argument of an optional text: NULL when it is empty.
func nullable(s string) sql.NullString { return sql.NullString{String: s, Valid: s != ""} }

// asJSON is v, a list of records, as a bound argument that SQL unpacks.
func asJSON(v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err) // cannot be: it is given structs of strings, finite numbers and booleans
	}
	return string(text)
}

// sqlState returns the five-character code of a PostgreSQL error, "" for any other error.
func sqlState(err error) string {
	if e := pq.As(err); e != nil {
		return string(e.Code)
	}
	return ""
}

// unavailable tells whether err means that the database cannot serve now, rather than that timedb has a bug.
// Codes: https://www.postgresql.org/docs/15/errcodes-appendix.html
func unavailable(err error) bool {
	state := sqlState(err)
	if state == "" {
		var netErr net.Error
		return errors.As(err, &netErr) || slices.ContainsFunc([]error{context.DeadlineExceeded, driver.ErrBadConn, io.EOF,
			io.ErrUnexpectedEOF, sql.ErrConnDone, sql.ErrTxDone}, func(e error) bool { return errors.Is(err, e) })
	}
	// Classes: connection, authorization, rollback (deadlock), resources, operator intervention, system. Codes: no
	// table, no privilege, read-only standby, no database, object in use, plan outdated by a change of the schema.
	return slices.Contains([]string{"08", "28", "40", "53", "57", "58"}, state[:2]) ||
		slices.Contains([]string{"42P01", "42501", "25006", "3D000", "55006", "0A000"}, state)
}

// schemaSection returns the named section of schema.sql, with the placeholders replaced by quoted identifiers.
func schemaSection(name, schema, role string) string {
	_, rest, found := strings.Cut(schemaSQL, "-- section: "+name+"\n")
	if !found {
		panic("schema.sql has no section " + name)
	}
	text, _, _ := strings.Cut(rest, "-- section: ")
	quoted := strings.NewReplacer(":schema", pq.QuoteIdentifier(schema), ":app_role", pq.QuoteIdentifier(role))
	return "\n" + quoted.Replace(strings.TrimSpace(text)) + "\n"
}

// createSQL is what `create tables` runs, in one transaction: the sections that were asked for.
func createSQL(schema, role string, withUsers, usersExist bool) string {
	text := ""
	sections := map[string]bool{"begin": true, "tables": true, "users": withUsers, "app role": role != "",
		"app role users": role != "" && (withUsers || usersExist)}
	for _, name := range []string{"begin", "tables", "users", "app role", "app role users"} {
		if sections[name] {
			text += schemaSection(name, schema, role)
		}
	}
	return text
}

// relations lists which tables and views of timedb exist in the store's schema. It reads the catalog, which does not
// hide what this role may not use: a name that is not in the answer is proven absent.
func (s *store) relations(ctx context.Context) ([]string, error) {
	rows, err := s.QueryContext(ctx, `
		SELECT c.relname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = $1 AND c.relname IN ('runs_table', 'series_table', 'values_table', 'current_values', 'users_table')
		ORDER BY c.relname`, s.schema)
	return scanAll(rows, err, func(name *string) []any { return []any{name} })
}

// usersTableExists: true is present, false is proven absent, an error is neither.
func (s *store) usersTableExists(ctx context.Context) (bool, error) {
	names, err := s.relations(ctx)
	return slices.Contains(names, "users_table"), err
}

// user is a row of users_table as an operator may see it: without digests.
type user struct {
	ID        string     `json:"user_id"`
	Tenant    string     `json:"tenant_id"`
	Email     string     `json:"email"`
	KeyID     string     `json:"key_id"`
	Access    string     `json:"access"`
	Active    bool       `json:"is_active"`
	ExpiresAt *time.Time `json:"expires_at"`
	LastUsed  *time.Time `json:"last_used_at"`
	CreatedAt time.Time  `json:"created_at"`
}

// LookupKey finds the user whose key has this digest, in whatever state: auth.go judges.
func (s *store) LookupKey(ctx context.Context, digest []byte) (keyRecord, error) {
	rows, err := s.QueryContext(ctx, `
		SELECT user_id, tenant_id, email, access = 'ro', is_active, key_digest, coalesce(expires_at <= clock_timestamp(), false),
		       coalesce(last_used_at < clock_timestamp() - interval '5 minutes', true)
		FROM users_table WHERE key_digest = $1`, digest)
	found, err := scanAll(rows, err, func(k *keyRecord) []any {
		return []any{&k.userID, &k.tenant, &k.email, &k.readOnly, &k.active, &k.digest, &k.expired, &k.useIsStale}
	})
	if err != nil || len(found) == 0 {
		return keyRecord{}, cmp.Or(err, errUnknownKey)
	}
	return found[0], nil
}

// TouchKey notes that a user's key was used now.
func (s *store) TouchKey(ctx context.Context, userID string) error {
	return s.exec(ctx, `UPDATE users_table SET last_used_at = clock_timestamp() WHERE user_id = $1`, userID)
}

// CreateUser stores u with the digest of its key and sets u.ID. A second user of that email in the tenant is an error.
func (s *store) CreateUser(ctx context.Context, u *user, digest []byte) error {
	err := s.inTx(ctx, func(tx *sql.Tx) error {
		return tx.QueryRowContext(ctx, `
			INSERT INTO users_table (tenant_id, email, key_id, key_digest, access) VALUES ($1, $2, $3, $4, $5)
			RETURNING user_id`, u.Tenant, u.Email, u.KeyID, digest, u.Access).Scan(&u.ID)
	})
	if sqlState(err) == "23505" {
		//lint:ignore ST1005 the contract quotes this sentence
		return fmt.Errorf("User with email '%s' already exists for this tenant.", u.Email)
	}
	return err
}

// Users lists users by tenant and email. An empty tenant or email means all.
func (s *store) Users(ctx context.Context, tenant, email string) ([]user, error) {
	rows, err := s.QueryContext(ctx, `
		SELECT user_id, tenant_id, email, key_id, access, is_active, expires_at, last_used_at, created_at FROM users_table
		WHERE ($1::uuid IS NULL OR tenant_id = $1) AND ($2::text IS NULL OR lower(email) = lower($2))
		ORDER BY tenant_id, lower(email)`, nullable(tenant), nullable(email))
	return scanAll(rows, err, func(u *user) []any {
		return []any{&u.ID, &u.Tenant, &u.Email, &u.KeyID, &u.Access, &u.Active, &u.ExpiresAt, &u.LastUsed, &u.CreatedAt}
	})
}

// SetActive deactivates or activates a user; from its return on every server sees it.
func (s *store) SetActive(ctx context.Context, userID string, active bool) error {
	return s.exec(ctx, `UPDATE users_table SET is_active = $2 WHERE user_id = $1`, userID, active)
}

// ReplaceKey gives a user a new key. The old one ends now.
func (s *store) ReplaceKey(ctx context.Context, userID, keyID string, digest []byte) error {
	return s.exec(ctx, `UPDATE users_table SET key_id = $2, key_digest = $3 WHERE user_id = $1`, userID, keyID, digest)
}

type series struct{ ID, Key, Unit, Description string }

func (x *series) fields() []any { return []any{&x.ID, &x.Key, &x.Unit} }

// seriesRef names a series by id, by key, or by both.
type seriesRef struct {
	id, key string
	field   string // where it stands in the request, for messages
}

// findSeries returns the series that each ref names, of those that existed at asOf in the caller's tenant. One that does
// not exist is a 404, an id with another key than the one given a 422.
func findSeries(ctx context.Context, c Caller, q querier, refs []seriesRef, asOf micros) ([]series, error) {
	ids, keys := make([]string, len(refs)), make([]string, len(refs))
	for i, ref := range refs {
		ids[i], keys[i] = ref.id, ref.key
	}
	rows, err := q.QueryContext(ctx, `
		SELECT coalesce(s.series_id::text, ''), coalesce(s.series_key, ''), coalesce(s.unit, '')
		FROM unnest($2::text[], $3::text[]) WITH ORDINALITY AS ref (id, key, number)
		LEFT JOIN LATERAL (
			SELECT * FROM series_table WHERE tenant_id = $1 AND series_id = nullif(ref.id, '')::uuid AND inserted_at <= $4
			UNION ALL
			SELECT * FROM series_table WHERE tenant_id = $1 AND series_key = ref.key AND ref.id = '' AND inserted_at <= $4
		) AS s ON true ORDER BY ref.number`, c.tenant, pq.StringArray(ids), pq.StringArray(keys), asOf)
	found, err := scanAll(rows, err, (*series).fields)
	for i, x := range found {
		ref := refs[i]
		if x.ID == "" {
			return nil, notFound("%s: there is no series %q", ref.field, cmp.Or(ref.id, ref.key))
		}
		if ref.key != "" && ref.key != x.Key {
			return nil, invalid("%s: series_id %s is not the series %q", ref.field, ref.id, ref.key)
		}
	}
	return found, err
}

// ensureSeries returns the series that each ref names, after creating those named by a key that is new, and how many it
// created. They are inserted in one order whoever inserts, so that two uploads of the same series cannot deadlock.
func ensureSeries(ctx context.Context, c Caller, tx *sql.Tx, refs []seriesRef, unit string, about map[string]string) (
	found []series, created int64, err error) {
	var keys, texts []string
	for _, ref := range refs {
		if ref.id == "" {
			keys, texts = append(keys, ref.key), append(texts, about[ref.key])
		}
	}
	result, err := tx.ExecContext(ctx, `
		INSERT INTO series_table (tenant_id, series_key, unit, description)
		SELECT $1::uuid, n.key, $2, nullif(n.description, '') FROM unnest($3::text[], $4::text[]) AS n (key, description)
		WHERE NOT EXISTS (SELECT FROM series_table t WHERE t.tenant_id = $1 AND t.series_key = n.key)
		ORDER BY n.key COLLATE "C" ON CONFLICT (tenant_id, series_key) DO NOTHING`,
		c.tenant, unit, pq.StringArray(keys), pq.StringArray(texts))
	if err != nil {
		return nil, 0, err
	}
	created, _ = result.RowsAffected() // lib/pq always knows
	found, err = findSeries(ctx, c, tx, refs, endOfTime)
	return found, created, err
}

// CreateSeries makes a series or finds the one of that key. created tells which; another unit is a 409.
func (s *store) CreateSeries(ctx context.Context, c Caller, x series) (id string, created bool, err error) {
	err = s.inTx(ctx, func(tx *sql.Tx) error {
		refs := []seriesRef{{key: x.Key, field: "name"}}
		found, n, err := ensureSeries(ctx, c, tx, refs, x.Unit, map[string]string{x.Key: x.Description})
		if err != nil {
			return err
		}
		if found[0].Unit != x.Unit {
			return conflict("unit: the series %q exists with the unit %q", x.Key, found[0].Unit)
		}
		id, created = found[0].ID, n == 1
		return nil
	})
	return id, created, err
}

// point is one value at its time. A NULL value is NaN: no NaN is ever stored.
type point struct {
	time, end micros
	value     float64
}

func comparePoints(a, b point) int {
	return cmp.Or(cmp.Compare(a.time, b.time), cmp.Compare(a.end, b.end))
}

// upload is one run with its values.
type upload struct {
	runID, workflowID    string
	start, finish, known *micros
	params               json.RawMessage // an object, or nil
	descriptions         map[string]string
	series               []seriesRef // as the rows named them
	points               [][]point   // of each of series
	rows                 int
	digest               [32]byte // of the request, to tell a retry from a clash
}

// Upload stores a run and its values, all or nothing, and returns the ids of its series by key. The same run_id with the
// same digest answers as the first time and stores nothing; with another digest it is a 409.
func (s *store) Upload(ctx context.Context, c Caller, u *upload) (map[string]string, error) {
	ids := map[string]string{}
	err := s.inTx(ctx, func(tx *sql.Tx) error {
		// The series first: as of the run's change_time they must exist.
		found, _, err := ensureSeries(ctx, c, tx, u.series, defaultUnit, u.descriptions)
		if err != nil {
			return err
		}
		run, err := insertRun(ctx, c, tx, u)
		if err != nil {
			return err
		}
		points := map[string][]point{}
		for i, x := range found {
			ids[x.Key] = x.ID
			points[x.ID] = append(points[x.ID], u.points[i]...)
		}
		if run == nil {
			return nil
		}
		blocks, err := cutBlocks(points)
		for batch := range slices.Chunk(blocks, blocksPerStatement) {
			if err == nil {
				err = insertBlocks(ctx, c, tx, u, run, batch)
			}
		}
		return err
	})
	return ids, err
}

// insertRun stores the run's own row and returns what its values share, or nil if the same request stored it before.
func insertRun(ctx context.Context, c Caller, tx *sql.Tx, u *upload) (*version, error) {
	var run version
	err := tx.QueryRowContext(ctx, `
		INSERT INTO runs_table (tenant_id, run_id, workflow_id, run_start_time, run_finish_time, known_time, run_params,
		                        rows_inserted, request_digest, changed_by, inserted_at)
		SELECT $1::uuid, coalesce($2, gen_random_uuid()), $3, $4::timestamptz, $5::timestamptz, coalesce($6::timestamptz, now),
		       $7::jsonb, $8::integer, $9::bytea, $10, now FROM clock_timestamp() AS now
		ON CONFLICT (tenant_id, run_id) DO NOTHING RETURNING run_id, run_order, known_time, inserted_at`,
		c.tenant, nullable(u.runID), u.workflowID, u.start, u.finish, u.known, nullable(string(u.params)), u.rows, u.digest[:],
		nullable(c.email)).Scan(&u.runID, &run.Order, &run.Known, &run.Change)
	if state := sqlState(err); strings.HasPrefix(state, "22") || state == "54001" {
		// Every other argument was checked: only run_params can hold what jsonb refuses (\u0000, numbers out of range).
		return nil, invalid("run_params holds something that PostgreSQL cannot store as jsonb")
	}
	if !errors.Is(err, sql.ErrNoRows) {
		return &run, err
	}
	var same bool
	err = tx.QueryRowContext(ctx, `SELECT request_digest = $3 FROM runs_table WHERE tenant_id = $1 AND run_id = $2`,
		c.tenant, u.runID, u.digest[:]).Scan(&same)
	if err == nil && !same {
		err = conflict("run_id %s was already used for a different request", u.runID)
	}
	return nil, err
}

// block is what one row of values_table holds: points of one series in order.
type block struct {
	seriesID string
	points   []point
}

// cutBlocks sorts the points of each series and cuts them into blocks. A point that occurs twice is a 422.
func cutBlocks(bySeries map[string][]point) ([]block, error) {
	var blocks []block
	for id, points := range bySeries {
		slices.SortFunc(points, comparePoints) // quick on what is in order
		begin := 0
		for i, p := range points {
			if i > 0 && comparePoints(points[i-1], p) == 0 {
				return nil, invalid("value_rows: the valid_time %s occurs twice for one series", p.time)
			}
			if i-begin == maxBlockValues || p.time-points[begin].time > maxBlockSpan {
				blocks = append(blocks, block{id, points[begin:i]})
				begin = i
			}
		}
		blocks = append(blocks, block{id, points[begin:]})
	}
	return blocks, nil
}

// insertBlocks stores blocks in one statement: all values end to end in three arrays, and a list of which stretch is whose.
func insertBlocks(ctx context.Context, c Caller, tx *sql.Tx, u *upload, run *version, blocks []block) error {
	type stretch struct {
		SeriesID string `json:"series_id"`
		First    int    `json:"first"` // positions in the arrays, from 1
		Last     int    `json:"last"`
	}
	var list []stretch
	var times, ends, values []uint64
	for _, b := range blocks {
		list = append(list, stretch{b.seriesID, len(times) + 1, len(times) + len(b.points)})
		for _, p := range b.points {
			times = append(times, uint64(p.time))
			ends = append(ends, uint64(p.end))
			values = append(values, math.Float64bits(p.value))
		}
	}
	wireEnds := encodeArray(oidTimestamptz, ends, nullTime)
	if len(wireEnds) == arrayHeader+4*len(ends) {
		wireEnds = nil // all are points
	}
	_, err := tx.ExecContext(ctx, `
		INSERT INTO values_table (tenant_id, series_id, run_id, run_order, version, known_time, change_time, changed_by,
		                          valid_from, valid_to, valid_times, valid_time_ends, "values")
		SELECT $1::uuid, b.series_id, $2::uuid, $3::bigint, 1, $4::timestamptz, $5::timestamptz, $6,
		       a.times[b.first], a.times[b.last], a.times[b.first:b.last],
		       CASE WHEN num_nonnulls(VARIADIC a.ends[b.first:b.last]) > 0 THEN a.ends[b.first:b.last] END, a."values"[b.first:b.last]
		FROM (SELECT $7::timestamptz[], $8::timestamptz[], $9::float8[]) AS a (times, ends, "values"),
		     json_to_recordset($10) AS b (series_id uuid, first integer, last integer)`,
		c.tenant, u.runID, run.Order, run.Known, run.Change, nullable(c.email), encodeArray(oidTimestamptz, times, nullTime),
		wireEnds, encodeArray(oidFloat8, values, nullFloat), asJSON(list))
	return err
}

// ---- arrays in PostgreSQL's binary form (array_send in src/backend/utils/adt/arrayfuncs.c): number of dimensions, whether
// there may be NULLs, the element type's oid, the length, the lower bound, then per element its byte length, -1 for
// NULL, and its bytes; all big-endian. Here every element is 8 bytes: a timestamptz or a float8, as its bits.

const (
	oidTimestamptz = 1184
	oidFloat8      = 701

	arrayHeader = 20
	nullTime    = 1 << 63            // the bits of noEnd
	nullFloat   = 0x7ff8000000000001 // the bits of math.NaN()
)

// encodeArray returns bits as an array of the element type oid; elements equal to null are sent as NULL.
func encodeArray(oid uint32, bits []uint64, null uint64) []byte {
	wire := make([]byte, 0, arrayHeader+12*len(bits))
	for _, field := range []uint32{1, 1, oid, uint32(len(bits)), 1} {
		wire = binary.BigEndian.AppendUint32(wire, field)
	}
	for _, b := range bits {
		if b == null {
			wire = binary.BigEndian.AppendUint32(wire, math.MaxUint32)
			continue
		}
		wire = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(wire, 8), b)
	}
	return wire
}

// decodeArray appends the elements of a one-dimensional array to dst, null in place of NULL.
func decodeArray(dst []uint64, wire []byte, null uint64) ([]uint64, error) {
	if len(wire) == arrayHeader-8 && binary.BigEndian.Uint32(wire) == 0 {
		return dst, nil // no dimension: empty
	}
	if len(wire) < arrayHeader || binary.BigEndian.Uint32(wire) != 1 {
		return nil, errors.New("array: expected one dimension")
	}
	n := binary.BigEndian.Uint32(wire[12:])
	wire = wire[arrayHeader:]
	for range n {
		switch {
		case len(wire) >= 12 && binary.BigEndian.Uint32(wire) == 8:
			dst = append(dst, binary.BigEndian.Uint64(wire[4:]))
			wire = wire[12:]
		case len(wire) >= 4 && binary.BigEndian.Uint32(wire) == math.MaxUint32:
			dst = append(dst, null)
			wire = wire[4:]
		default:
			return nil, errors.New("array: expected elements of 8 bytes")
		}
	}
	return dst, nil
}

// readQuery says which values to read. The zero times do not mean "any": use beginning and endOfTime.
type readQuery struct {
	series               []seriesRef // none means all of the tenant
	start, end           micros      // start <= valid_time < end
	startKnown, endKnown micros      // likewise known_time
	asOf                 micros      // only versions written up to then
	overlapping          bool        // every run, rather than the latest known
	allVersions          bool        // every version, rather than the current
}

// version is what all elements of one row of values_table share.
type version struct {
	RunID                 string
	Order                 int64
	Number                int
	Known, Change         micros
	ChangedBy, Annotation *string
	Tags                  pq.StringArray
}

// supersedes is the rule of the house: of two elements with the same series, valid_time and valid_time_end the later
// known counts; of runs known at the same time the one inserted later; of one run the higher version.
func (v *version) supersedes(w *version) bool {
	return cmp.Or(cmp.Compare(v.Known, w.Known), cmp.Compare(v.Order, w.Order), cmp.Compare(v.Number, w.Number)) > 0
}

// element is one value of one version; a NULL value is NaN.
type element struct {
	point
	from *version
}

// merger combines blocks that arrive ordered by their first valid_time into one ordered sequence of elements. open
// holds, in order, those that a later block may still supersede or precede.
type merger struct {
	everyRun    bool // only versions of one run supersede each other
	keepAll     bool // keep every version, ordered by valid_time and version
	open, spare []element
}

// compare orders elements; 0 means that one supersedes the other.
func (m *merger) compare(a, b *element) int {
	switch {
	case m.keepAll:
		return cmp.Or(cmp.Compare(a.time, b.time), cmp.Compare(a.from.Number, b.from.Number), cmp.Compare(a.end, b.end),
			cmp.Compare(a.from.Known, b.from.Known), cmp.Compare(a.from.Order, b.from.Order))
	case m.everyRun:
		return cmp.Or(comparePoints(a.point, b.point), cmp.Compare(a.from.Order, b.from.Order))
	}
	return comparePoints(a.point, b.point)
}

// add merges a block, sorted and without repetition, into the open elements.
func (m *merger) add(block []element) {
	if len(block) == 0 {
		return
	}
	cut := sort.Search(len(m.open), func(i int) bool { return m.compare(&m.open[i], &block[0]) >= 0 })
	rest := append(m.spare[:0], m.open[cut:]...)
	m.spare = rest
	out := m.open[:cut]
	for i := range block {
		e := &block[i]
		for len(rest) > 0 && m.compare(&rest[0], e) < 0 {
			out = append(out, rest[0])
			rest = rest[1:]
		}
		if len(rest) > 0 && m.compare(&rest[0], e) == 0 {
			if rest[0].from.supersedes(e.from) {
				e = &rest[0]
			}
			out = append(out, *e)
			rest = rest[1:]
			continue
		}
		out = append(out, *e)
	}
	m.open = append(out, rest...)
}

// flush emits the open elements before bound, which no later block can touch.
func (m *merger) flush(bound micros, emit func(*element) error) error {
	n := sort.Search(len(m.open), func(i int) bool { return m.open[i].time >= bound })
	for i := range m.open[:n] {
		if err := emit(&m.open[i]); err != nil {
			return err
		}
	}
	m.open = append(m.open[:0], m.open[n:]...)
	return nil
}

// Read calls emit for each value that q asks for, ordered by series_key, then valid_time (overlapping: known_time,
// valid_time), then version. The element is valid only during the call. Memory holds what overlaps, not the result. An
// unknown series is a 404; an error of emit ends the read and is returned.
func (s *store) Read(ctx context.Context, c Caller, q readQuery, emit func(*series, *element) error) (err error) {
	var list []series
	if q.series != nil {
		list, err = findSeries(ctx, c, s, q.series, q.asOf)
	} else {
		rows, bad := s.QueryContext(ctx, `SELECT series_id, series_key, unit FROM series_table
			WHERE tenant_id = $1 AND inserted_at <= $2`, c.tenant, q.asOf)
		list, err = scanAll(rows, bad, (*series).fields)
	}
	if err != nil {
		return err
	}
	slices.SortFunc(list, func(a, b series) int { return cmp.Compare(a.Key, b.Key) })
	list = slices.Compact(list)
	return s.readMerged(ctx, c, q, list, emit)
}

// The blocks of each series that overlap the window, and of each what lies in it (lo to hi; width_bucket is a binary
// search). A block that holds a value at or after the window's start begins at most the greatest span before it, so
// both bounds on valid_from are a range of the primary key.
const selectBlocks = `
	SELECT x.number, b.run_id, b.run_order, b.version, b.changed_by, b.annotation, b.tags,
	       array_send(ARRAY[b.known_time, b.change_time, b.valid_from]), array_send(b.valid_times[b.lo:b.hi]),
	       array_send(b.valid_time_ends[b.lo:b.hi]), array_send(b."values"[b.lo:b.hi])
	FROM unnest($2::uuid[]) WITH ORDINALITY AS x (series_id, number)
	CROSS JOIN LATERAL (
		SELECT *, width_bucket($3::timestamptz - interval '1 microsecond', v.valid_times) + 1 AS lo,
		       width_bucket($4::timestamptz - interval '1 microsecond', v.valid_times) AS hi
		FROM values_table v
		WHERE v.tenant_id = $1 AND v.series_id = x.series_id AND v.valid_to >= $3
		  AND v.valid_from >= $3::timestamptz - interval '768 hours' AND v.valid_from < $4
		  AND v.known_time >= $5 AND v.known_time < $6 AND v.change_time <= $7
		ORDER BY `

const (
	flatBlocks        = selectBlocks + `v.valid_from) AS b`
	overlappingBlocks = selectBlocks + `v.known_time, v.valid_from) AS b`
)

// readMerged reads the blocks of the series in list and emits what is left of them after merging.
func (s *store) readMerged(ctx context.Context, c Caller, q readQuery, list []series, emit func(*series, *element) error) error {
	ids := make([]string, len(list))
	for i, x := range list {
		ids[i] = x.ID
	}
	query := flatBlocks
	if q.overlapping {
		query = overlappingBlocks
	}
	// A read that ends early must cancel: closing rows would fetch all that is left of them.
	ctx, cancel := context.WithCancel(ctx)
	rows, err := s.QueryContext(ctx, query, c.tenant, pq.StringArray(ids), q.start, q.end, q.startKnown, q.endKnown, q.asOf)
	if err != nil {
		cancel()
		return err
	}
	defer rows.Close()
	defer cancel()
	var d blockDecoder
	m := merger{everyRun: q.overlapping, keepAll: q.allVersions}
	current, known, last := 1, beginning, beginning // what is being merged: a series, or in overlapping mode a known_time of it
	emitCurrent := func(e *element) error { return emit(&list[current-1], e) }
	for rows.Next() {
		number, v, elements, err := d.next(rows)
		if err != nil {
			return err
		}
		bound := endOfTime
		if number == current && (v.Known == known || !q.overlapping) {
			bound = d.from
		}
		if number < current || bound < last {
			return errors.New("readMerged: the database answered out of order")
		}
		if err := m.flush(bound, emitCurrent); err != nil {
			return err
		}
		current, known, last = number, v.Known, d.from
		m.add(elements)
	}
	if err := rows.Err(); err != nil {
		return err
	}
	return m.flush(endOfTime, emitCurrent)
}

// blockDecoder turns rows of selectBlocks into elements. Its buffers serve one row after the other.
type blockDecoder struct {
	from                        micros          // the row's first valid_time
	wire                        [4]sql.RawBytes // known_time, change_time and valid_from; valid_times; ends; values
	stamps, times, ends, values []uint64
	out                         []element
}

// next decodes the row at hand: the series' number, and the values.
func (d *blockDecoder) next(rows *sql.Rows) (number int, v *version, _ []element, err error) {
	v = &version{}
	err = rows.Scan(&number, &v.RunID, &v.Order, &v.Number, &v.ChangedBy, &v.Annotation, &v.Tags,
		&d.wire[0], &d.wire[1], &d.wire[2], &d.wire[3])
	d.ends = d.ends[:0]
	for i, into := range []*[]uint64{&d.stamps, &d.times, &d.ends, &d.values} {
		if err == nil && d.wire[i] != nil {
			*into, err = decodeArray((*into)[:0], d.wire[i], []uint64{nullTime, nullTime, nullTime, nullFloat}[i])
		}
	}
	if err != nil {
		return 0, nil, nil, err
	}
	v.Known, v.Change, d.from = micros(d.stamps[0]), micros(d.stamps[1]), micros(d.stamps[2])
	d.out = d.out[:0]
	for i, bits := range d.times { // the table checks that the arrays have one length
		end := noEnd
		if len(d.ends) > 0 {
			end = micros(d.ends[i])
		}
		d.out = append(d.out, element{point{micros(bits), end, math.Float64frombits(d.values[i])}, v})
	}
	return number, v, d.out, nil
}

// valueUpdate is one entry of PUT /values, in the form that correctValues reads.
type valueUpdate struct {
	seriesRef     `json:"-"`
	SeriesID      string   `json:"series_id"` // set by UpdateValues
	RunID         *string  `json:"run_id"`    // nil, like Known: the run is not named
	Known         *micros  `json:"known_time"`
	Time          micros   `json:"valid_time"`
	End           micros   `json:"valid_time_end"`
	SetValue      bool     `json:"set_value"` // or keep it, as with the two below
	Value         *float64 `json:"value"`     // nil: NULL
	SetAnnotation bool     `json:"set_annotation"`
	Annotation    string   `json:"annotation"` // "": none
	SetTags       bool     `json:"set_tags"`
	Tags          []string `json:"tags"`
}

type updateResult struct {
	RunID     string `json:"run_id"`
	Tenant    string `json:"tenant_id"`
	ValidTime micros `json:"valid_time"`
	SeriesID  string `json:"series_id"`
	ValueID   int64  `json:"value_id,omitempty"`
	Version   int    `json:"version"`
}

// correctValues finds for each update the element that it corrects, by the rule of supersedes, or the run that gains
// one; of updates of one value keeps the last; and stores those that change something. width_bucket is a binary
// search in a sorted array; only where one valid_time can have several ends, each element up to there is looked at.
const correctValues = `
	WITH target AS (
		SELECT u.*, e.version AS old_version, e.value AS old_value, e.annotation AS old_annotation, e.tags AS old_tags,
		       coalesce(e.run_id, r.run_id) AS target_run, coalesce(e.run_order, r.run_order) AS run_order,
		       coalesce(e.known_time, r.known_time) AS target_known
		FROM ROWS FROM (json_to_recordset($3) AS (series_id uuid, run_id uuid, known_time timestamptz, valid_time timestamptz,
		       valid_time_end timestamptz, set_value boolean, value float8, set_annotation boolean, annotation text,
		       set_tags boolean, tags text[])) WITH ORDINALITY
		     AS u (series_id, run_id, known_time, valid_time, valid_time_end, set_value, value, set_annotation, annotation,
		       set_tags, tags, number)
		LEFT JOIN LATERAL (
			SELECT v.*, v."values"[i] AS value
			FROM values_table v, generate_series(
			       CASE WHEN v.valid_time_ends IS NULL THEN width_bucket(u.valid_time, v.valid_times) ELSE 1 END,
			       width_bucket(u.valid_time, v.valid_times)) AS i
			WHERE v.tenant_id = $1 AND v.series_id = u.series_id AND v.valid_to >= u.valid_time
			  AND v.valid_from >= u.valid_time - interval '768 hours' AND v.valid_from <= u.valid_time
			  AND v.run_id = coalesce(u.run_id, v.run_id) AND v.known_time = coalesce(u.known_time, v.known_time)
			  AND v.valid_times[i] = u.valid_time AND v.valid_time_ends[i] IS NOT DISTINCT FROM u.valid_time_end
			ORDER BY v.known_time DESC, v.run_order DESC, v.version DESC LIMIT 1) AS e ON true
		LEFT JOIN LATERAL (
			SELECT * FROM runs_table r
			WHERE r.tenant_id = $1 AND num_nonnulls(u.run_id, u.known_time) > 0 AND e.run_id IS NULL
			  AND r.run_id = coalesce(u.run_id, r.run_id) AND r.known_time = coalesce(u.known_time, r.known_time)
			ORDER BY r.run_order DESC LIMIT 1) AS r ON true
	), next AS (
		SELECT DISTINCT ON (series_id, target_run, valid_time, valid_time_end) *, old_version IS NULL AND NOT bool_and(set_value)
		       OVER (PARTITION BY series_id, target_run, valid_time, valid_time_end) AS lacks_value,
		       CASE WHEN set_value THEN value ELSE old_value END AS new_value,
		       CASE WHEN set_annotation THEN nullif(annotation, '') ELSE old_annotation END AS new_annotation,
		       CASE WHEN set_tags THEN nullif(tags, '{}') ELSE old_tags END AS new_tags
		FROM target ORDER BY series_id, target_run, valid_time, valid_time_end, number DESC
	), stored AS (
		INSERT INTO values_table (tenant_id, series_id, run_id, run_order, version, known_time, change_time, changed_by,
		                          annotation, tags, valid_from, valid_to, valid_times, valid_time_ends, "values")
		SELECT $1::uuid, series_id, target_run, run_order, coalesce(old_version, 0) + 1, target_known, now, $2, new_annotation,
		       new_tags, valid_time, valid_time, ARRAY[valid_time],
		       CASE WHEN valid_time_end IS NOT NULL THEN ARRAY[valid_time_end] END, ARRAY[new_value]
		FROM next, clock_timestamp() AS now
		WHERE target_run IS NOT NULL AND (old_version IS NULL
		      OR (new_value, new_annotation, new_tags) IS DISTINCT FROM (old_value, old_annotation, old_tags))
		RETURNING series_id, run_id, valid_from, valid_time_ends[1] AS valid_time_end, version, value_id
	)
	SELECT n.number, coalesce(n.target_run::text, ''), n.valid_time, n.series_id, coalesce(s.value_id, 0),
	       coalesce(s.version, n.old_version, 0), n.lacks_value
	FROM next n LEFT JOIN stored s ON s.series_id = n.series_id AND s.run_id = n.target_run
	     AND s.valid_from = n.valid_time AND s.valid_time_end IS NOT DISTINCT FROM n.valid_time_end
	ORDER BY n.number`

// UpdateValues stores a new version for each update that changes something, all or none; the others are skipped.
// Corrections within one tenant wait for each other, so that each sees the one before.
func (s *store) UpdateValues(ctx context.Context, c Caller, updates []valueUpdate) (updated, skipped []updateResult, err error) {
	updated, skipped = []updateResult{}, []updateResult{}
	err = s.inTx(ctx, func(tx *sql.Tx) error {
		// A lock of the transaction needs no UPDATE privilege. Two tenants with the same hash would merely wait.
		if _, err := tx.ExecContext(ctx, `SELECT pg_advisory_xact_lock(hashtextextended($1, 0)) AS tenant_id`, c.tenant); err != nil {
			return err
		}
		refs := make([]seriesRef, len(updates))
		for i, u := range updates {
			refs[i] = u.seriesRef
		}
		found, err := findSeries(ctx, c, tx, refs, endOfTime)
		if err != nil {
			return err
		}
		for i, x := range found {
			updates[i].SeriesID = x.ID
		}
		type row struct {
			number     int
			lacksValue bool
			updateResult
		}
		rows, err := tx.QueryContext(ctx, correctValues, c.tenant, nullable(c.email), asJSON(updates))
		results, err := scanAll(rows, err, func(r *row) []any {
			return []any{&r.number, &r.RunID, &r.ValidTime, &r.SeriesID, &r.ValueID, &r.Version, &r.lacksValue}
		})
		for _, r := range results {
			u := updates[r.number-1]
			r.Tenant = c.tenant
			switch {
			case r.RunID == "" && u.RunID == nil && u.Known == nil:
				return notFound("%s: the series has no value at this valid_time and valid_time_end", u.field)
			case r.RunID == "":
				return notFound("%s: no run has this run_id or known_time", u.field)
			case r.lacksValue:
				return invalid("%s: value is required, because the run has none at this valid_time", u.field)
			case r.ValueID == 0:
				skipped = append(skipped, r.updateResult)
				continue
			}
			updated = append(updated, r.updateResult)
		}
		return err
	})
	return updated, skipped, err
}

// SeriesByID is the JSON object {series_id: series} of the caller's tenant, by series_key.
func (s *store) SeriesByID(ctx context.Context, c Caller) (text json.RawMessage, err error) {
	err = s.db.QueryRowContext(ctx, `
		SELECT coalesce(json_object_agg(series_id, json_build_object('series_key', series_key, 'description', description,
		       'unit', unit) ORDER BY series_key COLLATE "C"), '{}')
		FROM series_table WHERE tenant_id = $1`, c.tenant).Scan((*[]byte)(&text))
	return text, err
}
